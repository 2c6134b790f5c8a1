"""A plan: the one file that a coordinator writes, each hospital reads and approves by its hash, and a run then follows.

It says everything that decides what would happen at a site: the experiment with every default written out, who takes part,
for how long, and the hashes of the code and of the libraries that the coordinator runs. Two machines agree on a plan when
the SHA-256 of the file's bytes is the same, so one byte more is another plan.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from fedmix import config
from fedmix.config.reading import MAX_CONFIG_BYTES, read_yaml
from fedmix.disk import flush, reason_of
from fedmix.errors import ConfigError

PACKAGES = ("client", "fedmix", "server")  # what both ends install and run
CODE = {".py", ".json"}
LIBRARIES = ("fedmix", "flwr", "torch", "timm", "tokenizers", "numpy", "safetensors", "opacus")
HASH = re.compile(r"[0-9a-f]{64}")
ELSEWHERE = "not-in-the-plan"  # where a file lies is each machine's own affair, and the fingerprint leaves it out


def _hash(value: str) -> str:
    if not HASH.fullmatch(value):
        raise ValueError("a hash is 64 hexadecimal digits")
    return value


Hash = Annotated[str, AfterValidator(_hash)]


class Plan(BaseModel):
    """What would run, where, until when and with which code. ``valid_until`` is the last day, in UTC.

    ``keys``: each site's registered public key in OpenSSH's form, by which sites know each other in a secure sum; empty
    without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    experiment: dict[str, Any]
    fingerprint: Hash
    sites: tuple[str, ...]
    code: Hash
    versions: dict[str, str]
    lock: Hash
    valid_until: datetime.date
    coordinator: str
    created: datetime.datetime
    keys: dict[str, str] = {}

    @classmethod
    def of(
        cls,
        experiment: config.Experiment,
        sites: Sequence[str],
        *,
        coordinator: str,
        valid_days: int,
        keys: Mapping[str, str] | None = None,
    ) -> Plan:
        """The plan of an experiment over some of its sites, valid from now on.

        ``coordinator``: the address, host:port, that the sites dial. ``keys``: the sites' public keys, for a secure
        sum. Raises ConfigError for a site that the experiment does not know, or if those named leave a stage without any.
        """
        if experiment.attack is not None:
            raise ConfigError("the experiment holds an attack, which is for simulations alone; take attack out of it")
        restricted = config.build(_portable(restrict(experiment, sites)), source="the plan's experiment")
        created = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        return cls(
            name=experiment.name,
            experiment=restricted.model_dump(mode="json"),
            fingerprint=restricted.fingerprint(),
            sites=tuple(site.name for site in restricted.data.sites),
            code=code_hash(),
            versions={name: metadata.version(name) for name in LIBRARIES},
            lock=lock_hash(),
            valid_until=created.date() + datetime.timedelta(days=valid_days),
            coordinator=coordinator,
            created=created,
            keys=dict(keys or {}),
        )

    def resolved(self) -> config.Experiment:
        """The experiment. Raises ConfigError if this version reads it otherwise than the one that wrote the plan."""
        experiment = config.build(self.experiment, source="the plan's experiment")
        if experiment.fingerprint() != self.fingerprint:
            raise ConfigError(
                "the plan's fingerprint is not its experiment's: it was changed by hand, or written by another version of "
                "fedmix; ask the coordinator for a new plan"
            )
        if (self.name, self.sites) != (experiment.name, tuple(site.name for site in experiment.data.sites)):
            raise ConfigError("the plan's name or sites are not its experiment's; ask the coordinator for a new plan")
        return experiment

    def is_valid_on(self, day: datetime.date) -> bool:
        """Whether a day, in UTC, is not after the plan's last."""
        return day <= self.valid_until


def restrict(experiment: config.Experiment, sites: Sequence[str]) -> config.Experiment:
    """The experiment over some of its sites only. Raises ConfigError for one that it does not know, and for none at all."""
    known = {site.name for site in experiment.data.sites}
    if unknown := sorted(set(sites) - known):
        raise ConfigError(f"the experiment has no site {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values = experiment.model_dump(mode="json")
    values["data"]["sites"] = [site for site in values["data"]["sites"] if site["name"] in sites]
    return config.build(values, source="the experiment over the sites named")


def write(plan: Plan, path: Path) -> str:
    """Write a plan and return its digest. Raises ConfigError if the file is there: sites may have approved it."""
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        flush(path)
    except FileExistsError:
        raise ConfigError(f"{path} is there, and sites may have approved it; choose another name with --out") from None
    except OSError as error:
        raise ConfigError(f"cannot write the plan {path}: {reason_of(error)}") from None
    return digest(path)


def read(path: Path) -> Plan:
    """Read a plan, and check that its parts agree. Raises ConfigError that says what is wrong and what to do."""
    values = read_yaml(content_of(path).decode("utf-8", errors="replace"), "the plan")
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its top"
        raise ConfigError(
            f"the file is not a plan of this version ({where}: {first['msg'].lower()}); ask the coordinator for a new one"
        ) from None
    plan.resolved()
    return plan


def content_of(path: Path) -> bytes:
    """A plan's exact bytes. Raises ConfigError if it cannot be read, or is larger than any plan."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the plan: {reason_of(error)}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the plan holds more than {MAX_CONFIG_BYTES} bytes; a plan is pages, not megabytes")
    return content


def digest(path: Path) -> str:
    """SHA-256 of a plan's exact bytes, in hexadecimal digits."""
    return hashlib.sha256(content_of(path)).hexdigest()


def code_hash() -> str:
    """SHA-256 over all .py and .json files of the installed fedmix, client and server: paths, lengths and bytes."""
    total = hashlib.sha256()
    for name, path in sorted(_code_files()):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def lock_hash() -> str:
    """SHA-256 over the sorted name==version of everything that is installed beside this Python."""
    installed = {(re.sub(r"[-_.]+", "-", one.name).lower(), one.version) for one in metadata.distributions()}
    return hashlib.sha256("\n".join(f"{name}=={version}" for name, version in sorted(installed)).encode()).hexdigest()


def _code_files() -> Iterator[tuple[str, Path]]:
    """Every file of code by its path below the packages' parent."""
    for package in PACKAGES:
        found = find_spec(package)
        assert found is not None
        assert found.submodule_search_locations is not None
        folder = Path(next(iter(found.submodule_search_locations)))
        for path in folder.rglob("*"):
            if path.suffix in CODE and path.is_file():
                yield (Path(package) / path.relative_to(folder)).as_posix(), path


def _portable(experiment: config.Experiment) -> dict[str, Any]:
    """An experiment's values without the coordinator's own paths and studies, which are nobody else's business. None of them
    is in the fingerprint.
    """
    values = experiment.model_dump(mode="json") | {"baselines": {}, "study": None}
    values["model"]["warm_start"] = None
    values["data"]["cache"] = ELSEWHERE
    values["data"]["held_out"]["shards"] = [ELSEWHERE] * len(values["data"]["held_out"]["shards"])
    values["data"]["held_out"]["also"] = {}
    for site in values["data"]["sites"]:
        site["shard"] = site["shard"] and ELSEWHERE
    return values
