"""One experiment as typed, checked values: YAML in, an error that names key, value and what is allowed, a fingerprint out.

The models below are the single place that says which keys exist; ``json_schema()`` is made from them, so that editors
complete and check the YAML. Deep code never takes an Experiment: it is read at the edge and passed down in pieces.
Defaults are sizes and schedules that learnt something in minutes on two cores, unless a comment says otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from fedmix.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20  # a config is pages, not megabytes: refuse before parsing
MAX_CONFIG_VALUES, MAX_CONFIG_DEPTH = 100_000, 50  # aliases unfolded: a page of them can stand for gigabytes

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
StreamName = Literal["image", "text", "paired"]


class Section(BaseModel):
    """A part of an experiment: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PhantomData(Section):
    """Studies drawn from the phantom generator (fedmix/data/phantom.py)."""

    studies: Count
    look: Name = Field(description="appearance, phrasing and prevalence habits; `fedmix phantom --looks` lists them")
    seed: int = Field(default=0, ge=0, description="draws of different seeds share no study")
    difficulty: float = Field(default=1.0, gt=0.0, le=3.0, description="more anatomical variation, fainter findings")
    contrast: float = Field(default=1.0, gt=0.0, le=3.0, description="how strongly findings show")


class Site(Section):
    """One institute and the kind of data it holds."""

    name: Name
    stream: StreamName
    phantom: PhantomData | None = None
    shard: Path | None = Field(default=None, description="folder written by `fedmix prepare`")

    @model_validator(mode="after")
    def _one_source(self) -> Site:
        if (self.phantom is None) == (self.shard is None):
            raise ValueError("give a site either phantom or shard, not both and not neither")
        return self


class HeldOut(Section):
    """The central evaluation set, which no site ever holds."""

    phantom: PhantomData | None = None
    shards: tuple[Path, ...] = ()
    public: bool = Field(
        default=False, description="pictures and report texts of the held-out studies may be shown in the report"
    )
    probe_studies: Count = Field(default=1000, description="studies that train the linear probe; the rest are the test set")

    @model_validator(mode="after")
    def _one_source(self) -> HeldOut:
        if (self.phantom is None) == (not self.shards):
            raise ValueError("give held_out either phantom or shards, not both and not neither")
        return self


class Data(Section):
    """Sites, held-out set, and how a study becomes numbers."""

    image_size: Count = Field(default=48, description="pixels a side")
    max_words: int = Field(default=64, ge=4, le=512, description="token ids a report, the summary token included")
    tokenizer: Path | None = Field(default=None, description="a Hugging Face tokenizer folder; null is the shipped WordPiece")
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    held_out: HeldOut
    cache: Path = Field(default=Path("runs/.phantoms"), description="where drawn phantoms are kept between runs")

    @model_validator(mode="after")
    def _unique_names(self) -> Data:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("site names must differ from each other")
        return self


class Model(Section):
    """Sizes of the shared transformer (fedmix/model/encoder.py)."""

    patch_size: Annotated[int, Field(ge=4, multiple_of=4)] = Field(
        default=8, description="pixels a side; the coarsest scale averages 4"
    )
    vision_target: Literal["multi_scale", "single_scale", "norm_pix"] = Field(
        default="multi_scale",
        description="what hidden patches are predicted as: Laplacian pyramid, raw pixels, or MAE's normalised pixels",
    )
    width: Count = 96
    depth: Count = 4
    num_heads: Count = 4
    mlp_ratio: Positive = 4.0
    modality_experts: bool = Field(
        default=True, description="separate FFN and LayerNorm for image and text (VLMo); false shares them"
    )
    decoder_width: Count = 64
    decoder_depth: Count = 1
    decoder_heads: Count = 4
    embedding: Count = Field(default=64, description="size of the contrastive embedding")

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        for width, heads, name in (
            (self.width, self.num_heads, "width"),
            (self.decoder_width, self.decoder_heads, "decoder_width"),
        ):
            if width % heads or width % 4:
                raise ValueError(f"{name} = {width} must be a multiple of its number of heads ({heads}) and of 4")
        return self


class Objectives(Section):
    """Which losses a stage uses, at what weight, and how much they hide. A weight of 0 turns a loss off."""

    mvm: float = Field(default=1.0, ge=0.0, description="weight of masked vision modelling")
    mlm: float = Field(default=0.3, ge=0.0, description="weight of masked language modelling")
    contrast: float = Field(default=0.0, ge=0.0, description="weight of image-text contrast on pairs")
    match: float = Field(default=0.0, ge=0.0, description="weight of image-text matching on pairs")
    joint_share: Fraction = Field(default=0.0, description="share of the pairs of a batch also read as one joint sequence")
    hide_image_alone: OpenFraction = 0.70
    hide_image_paired: OpenFraction = 0.40
    hide_image_joint: OpenFraction = 0.75
    hide_text_alone: OpenFraction = 0.25
    hide_text_paired: OpenFraction = 0.15
    hide_text_joint: OpenFraction = 0.50
    label_smoothing: Fraction = Field(default=0.0, description="of the contrastive targets")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Objectives:
        if self.mvm + self.mlm + self.contrast + self.match == 0:
            raise ValueError("every objective has weight 0; give at least one a positive weight")
        if self.match > 0 and self.joint_share == 0:
            raise ValueError("match reads image and report as one sequence: set joint_share above 0")
        return self


class Optimiser(Section):
    """A site's optimiser during one stage."""

    kind: Literal["muon", "adamw"] = Field(
        default="muon", description="Muon on the block matrices and AdamW elsewhere, or AdamW alone"
    )
    lr: Positive = Field(default=2e-3, description="AdamW's learning rate at its peak")
    muon_lr: Positive = Field(default=1e-2, description="Muon's learning rate at its peak")
    weight_decay: float = Field(default=0.05, ge=0.0)
    clip_norm: Positive = Field(default=1.0, description="of the whole gradient, before the step")
    warmup: Fraction = Field(default=0.05, description="share of the stage's steps")
    final_lr: Fraction = Field(default=0.05, description="share of the peak left at the end of the cosine")
    keep_state: bool = Field(default=True, description="moments survive from round to round within a stage")


class Outer(Section):
    """The server's optimiser: theta <- theta - lr (D + momentum v) (DiLoCo, 2311.08105); 1 and 0 are plain averaging."""

    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    nesterov: bool = True


class Stage(Section):
    """Some rounds in which some streams train on some objectives."""

    name: Name
    rounds: Count
    streams: Annotated[tuple[StreamName, ...], Field(min_length=1)] = ("image", "text", "paired")
    sites: tuple[Name, ...] | None = Field(default=None, description="names; null takes every site of the streams")
    local_steps: Count = Field(default=60, description="optimiser steps a site takes in a round (H)")
    batch_size: Count = 24
    objectives: Objectives = Objectives()
    optimiser: Optimiser = Optimiser()
    outer: Outer = Outer()


class StreamMix(Section):
    """Fixed weights of the streams on the shared part of the trunk, renormalised over the streams present."""

    image: Fraction = 0.35
    text: Fraction = 0.25
    paired: Fraction = 0.40


class Aggregation(Section):
    """How the server adds the sites' updates up (fedmix/federation/aggregate.py)."""

    rule: Literal["modality_aware", "fedavg_all", "paired_only"] = "modality_aware"
    shared_mix: StreamMix = StreamMix()
    count_exponent: Fraction = Field(default=1.0, description="a in n^a: 1 weighs by examples, 0 counts sites alike")


class Federation(Section):
    """Rounds on the wire and on this machine."""

    threads_per_site: Count = Field(
        default=1, description="torch threads of a site's job; part of the result, so a value and not a guess"
    )
    workers: int = Field(default=0, ge=0, description="worker processes of the in-process engine; 0 is one per core")
    deadline_s: Positive = Field(default=3600.0, description="a site that has not replied by then is dropped for the round")
    min_sites: Count = Field(default=1, description="replies without which a round is a failure")
    max_failed_rounds: Count = Field(default=3, description="failed rounds in a row after which the run stops")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="autocast of the trunk; losses stay float32"
    )


class Evaluation(Section):
    """Central evaluation on the held-out set."""

    every: int = Field(default=0, ge=0, description="rounds between quick evaluations for the learning curve; 0 is none")
    gallery: Count = 500
    mask_ratio: OpenFraction = 0.75
    num_bootstrap: int = Field(default=200, ge=20)
    regeneration_images: Count = 500


class Experiment(Section):
    """Everything that decides a run's weights and report."""

    name: Name
    seed: int = Field(default=0, ge=0)
    data: Data
    model: Model = Model()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    aggregation: Aggregation = Aggregation()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    baselines: dict[Name, dict[str, JsonValue]] = Field(
        default={}, description="name -> overrides of this experiment; random_init evaluates the untrained model"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        size, patch = self.data.image_size, self.model.patch_size
        if size % patch or size < 2 * patch:
            raise ValueError(f"data.image_size = {size} must be twice model.patch_size = {patch}, or a larger multiple of it")
        for stage in self.stages:
            _check_stage(stage, self)
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stage names must differ from each other")
        return self

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages together."""
        return sum(stage.rounds for stage in self.stages)

    def stage_of(self, round_number: int) -> tuple[Stage, int]:
        """The stage that a round (counted from 1) belongs to, and the number of the stage's rounds before it."""
        if round_number < 1:
            raise ConfigError(f"round {round_number} does not exist; rounds count from 1")
        before = 0
        for stage in self.stages:
            if round_number <= before + stage.rounds:
                return stage, round_number - before - 1
            before += stage.rounds
        raise ConfigError(f"round {round_number} is past the last stage; the stages have {self.num_rounds} rounds")

    def to_yaml(self) -> str:
        """The resolved experiment, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def fingerprint(self) -> str:
        """SHA-256 of the resolved values that decide the weights.

        Where a file lies and how many processes compute on it changes nothing, so shard paths, the cache and the number
        of workers are left out: a hospital's path differs from the server's.
        """
        values = self.model_dump(mode="json", exclude={"baselines": True, "evaluation": True, "name": True})
        values["data"].pop("cache")
        values["data"].pop("held_out")
        for site in values["data"]["sites"]:
            site.pop("shard")
        for key in ("workers", "deadline_s", "max_failed_rounds", "min_sites"):
            values["federation"].pop(key)
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sites_of(stage: Stage, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that take part in a stage: of its streams and, if it names some, among those."""
    return tuple(site for site in sites if site.stream in stage.streams and (stage.sites is None or site.name in stage.sites))


def _check_stage(stage: Stage, experiment: Experiment) -> None:
    """Raise ValueError where a stage would fail only after the run has begun: nobody to train, nothing to learn or count."""
    unknown = set(stage.sites or ()) - {site.name for site in experiment.data.sites}
    if unknown:
        raise ValueError(f"stage {stage.name!r} names sites that data.sites does not hold: {sorted(unknown)}")
    sites = sites_of(stage, experiment.data.sites)
    if not sites:
        raise ValueError(f"stage {stage.name!r} has no site: none of data.sites holds one of its streams {list(stage.streams)}")
    streams = {site.stream for site in sites}
    for stream, weight in (("image", "mvm"), ("text", "mlm")):
        if stream in streams and not getattr(stage.objectives, weight):
            raise ValueError(
                f"stage {stage.name!r}: its {stream} sites have nothing to learn; give objectives.{weight} a positive weight, "
                f"or take {stream!r} out of its streams"
            )
    aggregation = experiment.aggregation
    if aggregation.rule == "paired_only" and "paired" not in streams:
        raise ValueError(f"stage {stage.name!r} has no paired site, and aggregation.rule = paired_only counts no other")
    if aggregation.rule == "modality_aware" and not any(getattr(aggregation.shared_mix, stream) for stream in streams):
        raise ValueError(f"stage {stage.name!r}: aggregation.shared_mix is 0 for all of its streams {sorted(streams)}")


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from YAML and apply ``key.path=value`` overrides.

    Raises ConfigError that names the key, the value and what is allowed.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; configs/ holds examples, configs/demo.yaml is a start") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} holds {len(raw)} bytes; a config has at most {MAX_CONFIG_BYTES}")
    return parse(raw.decode("utf-8", errors="replace"), overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Experiment:
    """The experiment that a YAML text describes; ``source`` is what errors call it."""
    values = _read_yaml(text, source)
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold keys and values at its top, such as name: demo")
    for override in overrides:
        _apply_override(values, override)
    return build(values, source=source)


def build(values: Mapping[str, Any], *, source: str = "config") -> Experiment:
    """The experiment of already parsed values."""
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(error))) from None
    for name in experiment.baselines:
        variant(experiment, name)  # a misspelt key in a baseline is found before hours of training
    return experiment


def variant(experiment: Experiment, name: str) -> Experiment:
    """The experiment of a baseline: this one with the baseline's overrides merged in.

    Mappings merge key by key, everything else (lists of stages too) is replaced.
    """
    values = experiment.model_dump(mode="json")
    overrides = values.pop("baselines")[name]
    merged = _merge(values, overrides)
    merged["name"] = name
    return build(merged, source=f"baselines.{name}")


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Experiment.model_json_schema()


def _read_yaml(text: str, source: str) -> Any:
    """Plain values from YAML. Beside YAMLError, its constructors let through what Python says of 2001-99-99 or !!int x."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source} is not YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{source} holds a value that YAML cannot read: {_short(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a config has at most {MAX_CONFIG_DEPTH} levels") from None
    _check_extent(values, source)
    return _unshared(values)


def _check_extent(values: Any, source: str) -> None:
    """Refuse what aliases make endless or huge, before anything copies it."""
    waiting, num_values = [(values, 0)], 1
    while waiting:
        node, depth = waiting.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        num_values += len(inner)
        if depth > MAX_CONFIG_DEPTH or num_values > MAX_CONFIG_VALUES:
            raise ConfigError(f"{source}: at most {MAX_CONFIG_VALUES} values in {MAX_CONFIG_DEPTH} levels, aliases unfolded")
        waiting.extend((value, depth + 1) for value in inner)


def _unshared(values: Any) -> Any:
    """The same values with every alias written out, so that an override of one place does not change another."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _merge(values: Any, overrides: Any) -> Any:
    if isinstance(values, dict) and isinstance(overrides, Mapping):
        return values | {key: _merge(values.get(key), value) for key, value in overrides.items()}
    return overrides


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b.0.c=value`` in place; the value is read as YAML, a number in the path indexes a list."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: write it as key=value, such as --set model.width=128")
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        node = node[_index(node, key, path)] if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {path}: {key!r} holds a value, it has no keys inside")
    value = _read_yaml(text, f"--set {path}: {_short(text)}")
    node[_index(node, last, path) if isinstance(node, list) else last] = value


def _index(items: list[Any], key: str, path: str) -> int:
    for position, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == key:
            return position
    if key.isdecimal() and len(key) < 6 and int(key) < len(items):
        return int(key)
    raise ConfigError(f"--set {path}: {key!r} is neither a name nor a position in a list of {len(items)}")


def _explain(error: ValidationError) -> Iterator[str]:
    """One sentence for each thing that is wrong: key, value, what is allowed."""
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield _unknown_key(key, str(problem["loc"][-1]))
        elif problem["type"] == "missing":
            yield f"{key} is missing; it must be given"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield f"{key}: {text}" if key else text
        else:
            yield f"{key} = {_short(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _unknown_key(key: str, name: str) -> str:
    near = difflib.get_close_matches(name, sorted(_known_keys()), n=1, cutoff=0.5)
    suggestion = f"did you mean {near[0]!r}?" if near else "`fedmix config schema` lists the known keys"
    return f"unknown key {key!r}; {suggestion}"


def _known_keys() -> set[str]:
    schema = Experiment.model_json_schema()
    return set(schema["properties"]).union(*(part.get("properties", {}) for part in schema["$defs"].values()))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
