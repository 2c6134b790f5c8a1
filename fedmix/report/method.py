"""The method card: what a run was made to do, in a table of its stages and a line for each choice, from its config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedmix import config
from fedmix.errors import ConfigError
from fedmix.report import quantities
from fedmix.report.learning import OBJECTIVE_TITLES

SHOWN = ("mvm", "mlm", "contrast", "match", "anchor", "semantic", "local")
SITES_OF = {"image": "image sites", "text": "report sites", "paired": "paired sites"}
STAGE_COLUMNS = ("Stage", "Rounds", "Data", "Objectives and weights", "A site's round", "Optimiser", "Server's step")


@dataclass(frozen=True)
class Method:
    """``stages`` has a row of STAGE_COLUMNS each; ``phantoms_only`` says that no site held a real study."""

    facts: tuple[tuple[str, str], ...]
    stages: tuple[tuple[str, ...], ...]
    phantoms_only: bool


def read_method(path: Path) -> tuple[Method | None, str]:
    """The method of a run's config.yaml, or None and the sentence that stands in for it."""
    if not path.exists():
        return None, "The run folder holds no config.yaml."
    try:
        experiment = config.load(path)
    except ConfigError:
        return None, "This fedmix cannot read the run's config.yaml, which another version may have written."
    facts = (
        ("Model", _model(experiment)),
        ("Objectives", _objectives(experiment)),
        ("Start", "random" if experiment.model.warm_start is None else "from local files, whose hashes the manifest has"),
        ("Sum at the server", _aggregation(experiment.aggregation)),
        ("On the way", _wire(experiment.wire)),
        ("Refused", _screening(experiment.screening)),
        ("Privacy", experiment.privacy.mode),
    )
    phantoms_only = all(site.phantom is not None for site in experiment.data.sites)
    return Method(facts, tuple(map(_stage, experiment.stages)), phantoms_only), ""


def _model(experiment: config.Experiment) -> str:
    model, data = experiment.model, experiment.data
    experts = "experts for image and text" if model.modality_experts else "all weights shared"
    return (
        f"one transformer of {quantities.plural(model.depth, 'block')}, {model.width} wide, {experts}; images of "
        f"{data.image_size} pixels a side in patches of {model.patch_size}, at most {data.max_words} tokens of a report"
    )


def _objectives(experiment: config.Experiment) -> str:
    """What the short names in the table stand for."""
    used = [name for name in SHOWN if any(getattr(stage.objectives, name) for stage in experiment.stages)]
    return quantities.listing([f"{name} is {OBJECTIVE_TITLES[name].lower()}" for name in used])


def _aggregation(aggregation: config.Aggregation) -> str:
    clip = "never clipped" if aggregation.clip is None else f"clipped at {aggregation.clip:g} medians of the round's lengths"
    return f"{aggregation.rule.replace('_', ' ')}, by {aggregation.combine.replace('_', ' ')}; {clip}"


def _wire(wire: config.Wire) -> str:
    kept = "" if wire.keep == 1 else f", the largest {quantities.percent(wire.keep, 0)} of each row"
    back = ", what coding lost goes into the next update" if wire.error_feedback and (wire.coding != "float32" or kept) else ""
    return f"{wire.coding}{kept}{back}"


def _screening(screening: config.Screening) -> str:
    strikes = quantities.plural(screening.max_strikes, "refusal")
    return f"updates over {screening.norm_bound:g} running medians of length; after {strikes} a site is asked no more"


def _stage(stage: config.Stage) -> tuple[str, ...]:
    weights = {name: getattr(stage.objectives, name) for name in SHOWN}
    inner, outer = stage.optimiser, stage.outer
    rate = f"muon {inner.muon_lr:g}, AdamW {inner.lr:g}" if inner.kind == "muon" else f"AdamW {inner.lr:g}"
    momentum = f", momentum {outer.momentum:g}" if outer.momentum else ""
    return (
        stage.name,
        str(stage.rounds),
        quantities.listing([SITES_OF[stream] for stream in stage.streams])
        if stage.sites is None
        else quantities.listing(stage.sites),
        ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight),
        f"{quantities.plural(stage.local_steps, 'step')} of {stage.batch_size}",
        rate,
        f"{outer.kind} {outer.lr:g}{momentum}",
    )
