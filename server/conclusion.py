"""How a run that has trained every round ends: the central evaluation, the model, and report.json.

Every step can be repeated, so a run whose end was interrupted is taken up there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.evaluation import suite
from fedmix.evaluation.features import Report
from fedmix.evaluation.held_out import HeldOut
from fedmix.federation import robust
from fedmix.model.encoder import MixedModel
from fedmix.report import energy, files, summary
from server import accounts, secure, site_scores
from server import held_out as central
from server.home import PLAN
from server.store import Parameters, RunStore, warm_start_hashes


def evaluate(
    experiment: config.Experiment,
    parameters: Parameters,
    held_out: HeldOut,
    *,
    tokenizer: Tokenizer,
    folder: Path,
    was_trained: bool = True,
    attack: Callable[[], Report] | None = None,
) -> dict[str, Any]:
    """The evaluation branch of report.json for some parameters; kept in the folder, so that a resumed run reads it.

    ``attack`` finds the branch ``membership``, where the sites' patients are at hand.
    """
    kept = kept_evaluation(experiment, folder)
    if kept is not None:
        return kept
    started = time.time()
    model = central.set_parameters(central.random_model(experiment, tokenizer), parameters)
    evaluation = _found(experiment, model, held_out, tokenizer, None, was_trained=was_trained)
    source = _source(experiment)
    if source is not None:
        central.write_examples(folder / "evaluation", evaluation.examples, held_out, tokenizer, source)
    report = evaluation.as_report()
    for name in experiment.data.held_out.also:  # one after the other: they may be large
        others = central.load(experiment.data, tokenizer, name)
        found = _found(experiment, model, others, tokenizer, name, was_trained=was_trained)
        report.setdefault("also", {})[name] = found.as_report()
    if attack is not None:
        report["membership"] = attack()
    elif experiment.evaluation.membership_patients:
        report["skipped"]["membership"] = "the sites' patients are not at the server; run `fedmix audit` at a site"
    result = {"of": _evaluated(experiment), "report": report, "seconds": time.time() - started}
    files.write_json(folder / "evaluation" / "evaluation.json", result)
    return result


def _found(
    experiment: config.Experiment,
    model: MixedModel,
    studies: HeldOut,
    tokenizer: Tokenizer,
    name: str | None,
    *,
    was_trained: bool,
) -> suite.Evaluation:
    """What a model does with the held-out set of this name; None is the main one."""
    settings = central.settings_of(experiment, name)
    settings = settings if was_trained else replace(settings, trained_on=())
    return suite.evaluate(model, studies, tokenizer=tokenizer, settings=settings)


def kept_evaluation(experiment: config.Experiment, folder: Path) -> dict[str, Any] | None:
    """An evaluation that an earlier start of this run finished, if it was of the same model, data and settings."""
    try:
        kept: dict[str, Any] = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if kept.get("of") == _evaluated(experiment) else None


def _evaluated(experiment: config.Experiment) -> str:
    """What decides an evaluation: the experiment's weights, the held-out set and the settings."""
    settings = experiment.evaluation.model_dump(mode="json", exclude=None if experiment.evaluation.at_sites else {"at_sites"})
    wanted = [experiment.data.held_out.model_dump(mode="json"), settings]
    if not wanted[0]["also"]:  # as before there were these
        wanted[0].pop("also")
    if experiment.model.warm_start is not None:
        wanted.append(warm_start_hashes(experiment))
    return hashlib.sha256(json.dumps([experiment.fingerprint(), *wanted], sort_keys=True).encode()).hexdigest()


def _source(experiment: config.Experiment) -> str | None:
    """Whose pictures a report may show: phantoms' and public studies', never a site's."""
    if experiment.data.held_out.phantom is not None:
        return "phantom"
    return "public" if experiment.data.held_out.public else None


def write_report(
    experiment: config.Experiment,
    store: RunStore,
    evaluation: Mapping[str, Any],
    found: Mapping[str, Any],
    alone: Mapping[str, site_scores.Sums] = MappingProxyType({}),
) -> None:
    """Say that the run is completed, and write report.json.

    ``found``: evaluations of its baselines, by name; ``alone``: by site its scores of a model that it trained for itself.
    """
    committed = store.latest()
    assert committed is not None
    totals = committed.totals
    store.finish("completed")
    manifest, wall_s = store.manifest, store.wall_s
    value = site_scores.value_of(experiment, store.folder, alone)
    sites = [
        {
            "name": site.name,
            "stream": site.stream,
            "studies": int(totals.get(f"studies/{site.name}", 0)),
            "examples": int(totals.get(f"examples/{site.name}", 0)),
            "bytes_up": int(totals.get(f"bytes_up/{site.name}", 0)),
            "bytes_down": int(totals.get(f"bytes_down/{site.name}", 0)),
        }
        | value.get(site.name, {})
        for site in experiment.data.sites
    ]
    report = summary.build_report(
        run={
            "name": experiment.name,
            "state": "completed",
            "seed": experiment.seed,
            "started": manifest["started"],
            "finished": manifest["finished"],
            "rounds": experiment.num_rounds,
        },
        sites=sites,
        evaluation=evaluation["report"],
        baselines={name: _told(one) for name, one in found.items()},
        communication={
            "bytes_up": _sum(totals, "bytes_up/"),
            "bytes_down": _sum(totals, "bytes_down/"),
            "bytes_full_fp32": int(totals.get("bytes_full_fp32", 0)),
        },
        privacy=accounts.privacy_of(experiment, totals) | secure.privacy_of(experiment, totals),
        timing={
            "wall_s": wall_s,
            "local_train_s": totals["local_train_s"],
            "aggregate_s": totals["aggregate_s"],
            "evaluate_s": evaluation["seconds"] + sum(one["seconds"] for one in found.values()),
            # Sites whose clocks stand still say that they trained in no time; the rounds were no worse for it.
            "overhead_ratio": totals["rounds_s"] / totals["local_train_s"] if totals["local_train_s"] else None,
        },
        aggregation={
            "rule": experiment.aggregation.rule,
            "combine": experiment.aggregation.combine,
            "promises": _promises(experiment),
        },
        energy=energy.estimate(manifest["hardware"], wall_s, is_on_one_machine=not (store.folder / PLAN).exists()),
    )
    files.write_json(store.folder / "report.json", report)


def _promises(experiment: config.Experiment) -> list[str]:
    """What aggregation promises in each stage, with the experiment's sites."""
    return [
        f"stage {stage.name}, {promise}"
        for stage in experiment.stages
        for promise in robust.promises(robust.num_sites_of_tower(stage, experiment.data.sites), experiment.aggregation)
    ]


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline's branch of report.json."""
    return {"evaluation": result["report"]} | ({"site": result["site"]} if "site" in result else {})


def _sum(totals: Mapping[str, float], prefix: str) -> int:
    return int(sum(value for name, value in totals.items() if name.startswith(prefix)))
