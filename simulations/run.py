"""A whole experiment on one machine: shards, the run itself, its baselines, central evaluation and the report.

Every step can be repeated: phantoms are kept, rounds are committed, a finished baseline is not trained again. So a run
that was stopped goes on with ``resume`` where it was, and the report is the same as if nothing had happened.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from client.place import Place
from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import FedmixError, RunError
from fedmix.evaluation.held_out import HeldOut
from fedmix.report import files, html
from fedmix.report.history import EVENTS
from server import held_out as central
from server import site_scores
from server.app import build_app, quick_evaluation
from server.conclusion import evaluate, kept_evaluation, write_report
from server.deploy import teller
from server.model_folder import save_model
from server.store import Parameters, RunStore
from simulations import attacks, baselines, engine
from simulations.membership import membership
from simulations.partition import prepare_sites
from simulations.ray_engine import run_on_ray
from simulations.superlink import run_on_superlink

EngineName = Literal["inprocess", "ray", "superlink"]
OnMethod = Callable[[str], None]
MAIN = "fedmix"  # what the method of the run itself is called beside its baselines


class View(Protocol):
    """What shows a run while it goes on (fedmix/report/terminal.py)."""

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """A run of so many rounds over sites, given as name and stream, begins."""

    def update(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl has come."""

    def say(self, sentence: str) -> None:
        """Something that is not a round begins: drawing phantoms, evaluating, a baseline."""


@dataclass(frozen=True)
class Ready:
    """What the run and its baselines share."""

    tokenizer: Tokenizer
    shards: dict[str, Path]
    held_out: HeldOut
    engine: EngineName
    view: View


def simulate(
    experiment: config.Experiment,
    out: Path,
    *,
    engine_name: EngineName,
    resume: bool,
    view: View,
    on_method: OnMethod = lambda name: None,
) -> Path:
    """Run an experiment and its baselines; returns the path of report.html. ``on_method`` hears what begins, by name.

    Raises FedmixError for everything a user can mend; the run folder then says ``failed`` and why. Ctrl-C leaves the run
    ``running``, to be taken up with ``resume``.
    """
    attacks.check(experiment, engine_name)
    baselines.check(experiment)
    store = RunStore(out, experiment, resume=resume)
    for name in store.damaged:
        view.say(f"checkpoint {name} is damaged and was passed over; its round is trained again")
    try:
        view.say("drawing phantoms and opening shards")
        ready = _prepare(experiment, engine_name, view)
        on_method(MAIN)
        parameters = _train(experiment, store, ready)
        evaluation = _evaluate(experiment, parameters, ready, store.folder, "the model")
        save_model(store.folder / "model", experiment, parameters, ready.tokenizer)
        found: dict[str, dict[str, Any]] = {}
        for name in experiment.baselines:
            on_method(name)
            found |= _baseline(experiment, name, out / "baselines", ready)
        write_report(experiment, store, evaluation, found, _scores_alone(experiment, out / "baselines"))
        return html.write_report(out)
    except (FedmixError, OSError) as error:
        store.finish("failed", str(error))
        raise


def _prepare(experiment: config.Experiment, engine_name: EngineName, view: View) -> Ready:
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    shards = prepare_sites(experiment.data, tokenizer, altered=attacks.alterations(experiment.attack))
    return Ready(tokenizer, shards, central.load(experiment.data, tokenizer), engine_name, view)


def _train(experiment: config.Experiment, store: RunStore, ready: Ready) -> Parameters:
    """Run the rounds that are not yet committed and return the final parameters."""
    committed = store.latest()
    is_trained = committed is not None and committed.round_number == experiment.num_rounds
    if committed is not None and is_trained and not site_scores.is_due(experiment, store.folder):
        # A kill may have come between the last round and its point on the learning curve.
        add_point = quick_evaluation(experiment, store, ready.view.update, ready.held_out)
        add_point(committed.round_number, experiment.stages[-1].name, committed.parameters)
    else:
        ready.view.start(experiment.num_rounds, {site.name: site.stream for site in experiment.data.sites})
        places = [
            Place(site.name, store.folder / "config.yaml", ready.shards[site.name], store.folder / "sites" / site.name)
            for site in experiment.data.sites
        ]
        threads = experiment.federation.threads_per_site
        cores = threads * experiment.federation.processes_per_site
        num_workers = experiment.federation.workers or engine.default_workers(len(places), cores)
        (store.folder / EVENTS).unlink(missing_ok=True)
        app = build_app(
            experiment,
            store,
            watch=teller(store.folder, ready.view.update),
            held_out=ready.held_out,
            evaluates_beside=len(os.sched_getaffinity(0)) > num_workers * cores,
        )
        if ready.engine == "ray":
            run_on_ray(app, places, num_workers=num_workers, threads_per_site=cores)
        elif ready.engine == "superlink":
            with store.lent():
                run_on_superlink(store.folder, places, threads_per_site=threads, watch=ready.view.update)
        elif experiment.attack is not None:
            engine.run_in_process(app, places, num_workers=0, make_app=attacks.Liar(experiment.attack))
        else:
            engine.run_in_process(app, places, num_workers=num_workers)
        committed = store.latest()
    if committed is None or committed.round_number < experiment.num_rounds:
        raise RunError("the engine stopped before the last round; go on with --resume")
    return committed.parameters


def _evaluate(
    experiment: config.Experiment, parameters: Parameters, ready: Ready, folder: Path, what: str, *, was_trained: bool = True
) -> dict[str, Any]:
    """What ``evaluate`` finds, and the word that it begins."""
    if kept_evaluation(experiment, folder) is None:
        ready.view.say(f"evaluating {what}")
    return evaluate(
        experiment,
        parameters,
        ready.held_out,
        tokenizer=ready.tokenizer,
        folder=folder,
        was_trained=was_trained,
        attack=partial(membership, experiment, parameters, ready.shards, ready.tokenizer)
        if experiment.evaluation.membership_patients
        else None,
    )


def _baseline(experiment: config.Experiment, name: str, folder: Path, ready: Ready) -> dict[str, dict[str, Any]]:
    """Train what a baseline changes in run folders of its own, and evaluate it like the main run; results by name."""
    if name in baselines.UNTRAINED:
        other = config.variant(experiment, name)
        begin = central.random_model if name == baselines.RANDOM_INIT else central.initial_model
        parameters = central.parameters_of(begin(other, ready.tokenizer))
        return {name: _evaluate(other, parameters, ready, folder / name, "the untrained model", was_trained=False)}
    if name in baselines.SPECIAL:
        other = config.variant(experiment, name)
        return {name: kept_evaluation(other, folder / name) or _pooled(other, name, folder / name, ready)}
    found = {
        one: kept_evaluation(other, folder / one) or _federated(other, one, folder / one, ready)
        for one, other in baselines.federated(experiment, name).items()
    }
    if name in baselines.LOCAL_ONLY:
        candidates = [baselines.alone_name(site) for site in baselines.lonely(config.variant(experiment, name))]
        best = baselines.best({one: found[one]["report"] for one in candidates})
        found[baselines.BEST_SITE] = found[best] | {"site": best, "seconds": 0.0}
    return found


def _scores_alone(experiment: config.Experiment, folder: Path) -> dict[str, site_scores.Sums]:
    """By site, what it scores the model that it trained for itself; nothing unless baselines and sites were asked for that."""
    if not set(baselines.LOCAL_ONLY) & set(experiment.baselines):
        return {}
    found = {site.name: site_scores.kept(experiment, folder / baselines.alone_name(site)) for site in experiment.data.sites}
    return {site: of_run[site].get("scores", {}) for site, of_run in found.items() if of_run is not None}


def _pooled(experiment: config.Experiment, name: str, folder: Path, ready: Ready) -> dict[str, Any]:
    ready.view.say(f"baseline {name}")
    pooled = baselines.SPECIAL[name](experiment, ready.shards, ready.tokenizer)
    cost = {"steps": pooled.steps, "examples": pooled.examples, "core_s": pooled.core_s}
    files.write_json(folder / "training.json", cost)
    return _evaluate(experiment, pooled.parameters, ready, folder, name)


def _federated(experiment: config.Experiment, name: str, folder: Path, ready: Ready) -> dict[str, Any]:
    ready.view.say(f"baseline {name}")
    store = _store(folder, experiment)
    parameters = _train(experiment, store, ready)
    store.finish("completed")
    result = _evaluate(experiment, parameters, ready, folder, name)
    shutil.rmtree(folder / "sites", ignore_errors=True)  # optimiser states: most of the folder, and nothing takes them up
    return result


def _store(folder: Path, experiment: config.Experiment) -> RunStore:
    """A baseline's run folder: taken up where it was, or begun; one that a kill left without a manifest is begun anew."""
    if (folder / "manifest.json").exists():
        return RunStore(folder, experiment, resume=True)
    shutil.rmtree(folder, ignore_errors=True)
    return RunStore(folder, experiment, resume=False)
