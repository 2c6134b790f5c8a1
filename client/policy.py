"""What a hospital allows, as its own file says it. No job can change or weaken it: ``client/gate.py`` applies it."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmix import config
from fedmix.config.base import OpenFraction
from fedmix.config.evaluating import MIN_PATIENTS
from fedmix.config.reading import MAX_CONFIG_BYTES, read_yaml
from fedmix.disk import reason_of
from fedmix.errors import ConfigError, PolicyError

RECORDS = (
    *("greeting", "receipt", "examples", "metrics", "second_moments", "privacy", "deltas", "scores"),
    *("keys", "shares", "masked", "sum", "unmask"),  # of a secure sum
)
Pattern = Annotated[str, Field(pattern=re.compile(r"^[a-z0-9_.*/?\[\]-]{1,80}$"))]
Hour = Annotated[int, Field(ge=0, le=24)]


class Part(BaseModel):
    """A part of a policy: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Hours(Part):
    """When a round may begin, in whole hours of this machine's local time; from 20 until 6 is over midnight."""

    begin: Hour = 0
    end: Hour = 24

    def hold(self, hour: int) -> bool:
        """Whether an hour of the day, 0 to 23, is among them."""
        if self.begin < self.end:
            return self.begin <= hour < self.end
        return hour >= self.begin or hour < self.end


class Privacy(Part):
    """What a plan must have before this site takes part."""

    mode: Literal["none", "dp", "noisy_updates", "central_noise"] = "none"
    epsilon: float | None = Field(
        default=None,
        gt=0.0,
        description="largest privacy loss of all plans together; under central_noise of a run, for the server counts it",
    )
    delta: OpenFraction = Field(default=1e-5, description="largest delta that a plan may count that loss with")
    secure_sum: bool = False


class Policy(Part):
    """One hospital's policy. ``groups`` and ``metrics`` are patterns, in which * stands for anything."""

    records: tuple[Literal[RECORDS], ...] = Field(  # type: ignore[valid-type]
        default=RECORDS, description="parts of a message that may leave at all"
    )
    groups: tuple[Pattern, ...] = Field(default=("*",), description="parameter groups whose change may leave")
    metrics: tuple[Pattern, ...] = Field(
        default=("*/loss",), description="metrics that may leave; score/* are sums over held-out patients"
    )
    max_norm: float = Field(default=100.0, gt=0.0, description="longest update of a round, Euclidean length of all changes")
    min_studies: int = Field(default=50, ge=1, description="fewest training studies with which this site takes part")
    min_patients: int = Field(
        default=MIN_PATIENTS, ge=1, description="fewest held-out patients of whom a score may leave, if any may"
    )
    max_rounds: int = Field(default=1000, ge=1, description="updates that may leave under one plan, repeated rounds among them")
    max_bytes: int = Field(default=100 << 30, ge=1, description="bytes that may leave under one plan")
    hours: Hours = Hours()
    privacy: Privacy = Privacy()

    def check_hour(self, now: datetime) -> None:
        """Refuse what begins outside the hours; ``now`` is local time."""
        if not self.hours.hold(now.hour):
            raise PolicyError(
                f"this site takes part from {self.hours.begin} to {self.hours.end} o'clock of its local time, it is {now.hour} "
                "there; a run that goes on, or is resumed, within these hours finds it again"
            )

    def check_privacy(self, offered: config.Privacy) -> None:
        """Refuse a plan that protects patients less than this site asks for."""
        wanted = self.privacy
        asked: str = "dp" if wanted.mode == "none" and wanted.epsilon is not None else wanted.mode
        if asked not in ("none", offered.mode):
            what = "differential privacy" if asked == "dp" else f"privacy.mode = {asked}"
            raise PolicyError(f"this site's policy asks for {what}, which the plan does not have")
        # The plan's epsilon bounds all that the site's privacy ledger holds, of earlier plans too (client/private.py).
        if wanted.epsilon is not None and (offered.epsilon is None or offered.epsilon > wanted.epsilon):
            asked = "no limit" if offered.epsilon is None else f"{offered.epsilon:g}"
            raise PolicyError(f"this site's policy gives an epsilon of {wanted.epsilon:g} at most, the plan asks for {asked}")
        if wanted.epsilon is not None and offered.delta > wanted.delta:  # a larger one makes the same steps look cheaper
            raise PolicyError(
                f"this site's policy counts privacy loss with a delta of {wanted.delta:g} at most, the plan with "
                f"{offered.delta:g}"
            )

    def check_secure_sum(self, offered: config.SecureSum | None) -> None:
        """Refuse a plan that shows the coordinator this site's updates, where this site asks for secure sums."""
        if self.privacy.secure_sum and offered is None:
            raise PolicyError("this site's policy asks for secure sums, which the plan does not have")

    def check_names(self, records: Collection[str], groups: Collection[str], metrics: Collection[str]) -> None:
        """Refuse what holds a record, a parameter group or a metric that may not leave."""
        if extra := set(records) - set(self.records):
            raise PolicyError(f"this site's policy does not let {len(extra)} of the reply's records leave")
        if held := sorted(group for group in groups if not _fits(group, self.groups)):
            raise PolicyError(f"this site's policy does not let {_few(held)} leave")
        if num_held := sum(not _fits(name, self.metrics) for name in metrics):
            raise PolicyError(f"this site's policy does not let {num_held} of the reply's metrics leave")

    def lets_leave(self, records: Collection[str], metrics: Collection[str]) -> bool:
        """Whether all of these may leave."""
        return set(records) <= set(self.records) and all(_fits(name, self.metrics) for name in metrics)

    def check_amount(self, *, updates: int, num_bytes: int) -> None:
        """Refuse more updates or bytes under one plan than this site gives; counted with the one that is to leave."""
        if updates > self.max_rounds:
            raise PolicyError(f"this site has sent the {self.max_rounds} updates that its policy gives to one plan")
        if num_bytes > self.max_bytes:
            raise PolicyError(f"this site would send more than the {self.max_bytes} bytes that its policy gives to one plan")


def read(path: Path) -> Policy:
    """A policy from its file. Raises ConfigError for anything that is not wholly understood, or missing."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"this site's policy cannot be read: {reason_of(error)}; nothing leaves without one") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"this site's policy holds {len(raw)} bytes; it has at most {MAX_CONFIG_BYTES}")
    values = read_yaml(raw.decode("utf-8", errors="replace"), "this site's policy")
    try:
        return Policy.model_validate({} if values is None else values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its top"
        raise ConfigError(f"this site's policy is wrong at {where}: {first['msg'].lower()}") from None


def default_text() -> str:
    """A policy file with every default written out, and what each means above it."""
    lines = ["# What this hospital allows. No plan can change it; `fedmix site doctor` says whether it is understood."]
    lines += ["# Plans are allowed one by one with `fedmix site approve`. Patterns: * stands for anything.", ""]
    policy = Policy().model_dump(mode="json")
    for name, field in Policy.model_fields.items():
        about = field.description or (field.annotation.__doc__ or "").split(". ")[0].rstrip(".")
        lines += [f"# {about}", f"{name}: {_inline(policy[name])}"]
    return "\n".join([*lines, ""])


def _inline(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(f'"{each}"' for each in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _few(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more groups" if len(names) > len(shown) else "")
