"""A synthetic study folder: cells whose numbers are written down here, none was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from little import values
from synthetic_run import evaluation, report_values

from fedmix import config
from fedmix.report.files import write_json
from fedmix.report.study import step_key
from fedmix.report.summary import build_report

Level = Mapping[str, float]  # method -> how good it is, from 0 (guessing) to 1

# Two regimes with three seeds: main method, best site and pooled training, which all rise and fall with the seed.
LEVELS = {
    "plentiful": [
        {"fedmix": 0.80, "paired_only": 0.78, "site_west": 0.5, "best_site": 0.5, "centralised": 0.9},
        {"fedmix": 0.84, "paired_only": 0.80, "site_west": 0.5, "best_site": 0.5, "centralised": 0.9},
        {"fedmix": 0.76, "paired_only": 0.74, "site_west": 0.5, "best_site": 0.5, "centralised": 0.9},
    ],
    "scarce": [
        {"fedmix": 0.60, "paired_only": 0.30, "site_west": 0.2, "best_site": 0.2, "centralised": 0.7},
        {"fedmix": 0.62, "paired_only": 0.28, "site_west": 0.2, "best_site": 0.2, "centralised": 0.7},
        {"fedmix": 0.58, "paired_only": 0.33, "site_west": 0.2, "best_site": 0.2, "centralised": 0.7},
    ],
}


def plan(folder: Path, num_seeds: int = 3) -> dict[str, Any]:
    """The study's experiment as plain values."""
    study = {"seeds": list(range(1, num_seeds + 1)), "regimes": {"plentiful": {}, "scarce": {}}}
    return values(folder, name="pairs", study=study, baselines={"paired_only": {}, "best_site": {}, "centralised": {}})


def write_study(folder: Path, levels: Mapping[str, list[Level]] = LEVELS) -> Path:
    """A study's folder with a completed cell for every entry of ``levels``; cells left out were never begun."""
    folder.mkdir(parents=True)
    wanted = plan(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
    experiment = config.build(wanted)
    costs = {
        step_key(experiment, stage, site.stream): {"image": 0.5, "text": 0.25, "paired": 2.0}[site.stream]
        for stage in experiment.stages
        for site in config.sites_of(stage, experiment.data.sites)
    }
    write_json(folder / "costs.json", {"schema": 1, "steps": costs})
    for regime, seeds in levels.items():
        for number, methods in enumerate(seeds, 1):
            write_cell(folder / regime / f"seed-{number}", methods)
    return folder


def write_cell(folder: Path, methods: Level, *, state: str = "completed") -> None:
    """A cell's run folder, with the rows of the main method's sites and what the pooled run took."""
    folder.mkdir(parents=True)
    found = {name: {"evaluation": _evaluation(level)} for name, level in methods.items() if name != "fedmix"}
    if "best_site" in found:
        found["best_site"]["site"] = "site_west"  # type: ignore[assignment]
    values = report_values(evaluation=_evaluation(methods["fedmix"]), baselines=found)
    write_json(folder / "report.json", build_report(**values))
    (folder / "manifest.json").write_text(json.dumps({"state": state, "cause": None}))
    write_trained(folder, {"unpaired": (1, ("north", "south")), "paired": (2, ("west",))})
    write_trained(folder / "baselines/paired_only", {"paired": (2, ("west",))})
    write_trained(folder / "baselines/site_west", {"paired": (1, ("west",))})
    pooled = folder / "baselines/centralised"
    pooled.mkdir(parents=True)
    write_json(pooled / "training.json", {"steps": 8, "examples": {"image": 8, "text": 8, "paired": 16}, "core_s": 9.0})


def write_trained(folder: Path, stages: Mapping[str, tuple[int, tuple[str, ...]]]) -> None:
    """Config and metrics of a federated run: rounds and sites by stage, four studies a step and 1,000 bytes an update."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = values(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
    streams = {site["name"]: site["stream"] for site in wanted["data"]["sites"]}
    lines, number = [], 0
    for stage, (rounds, sites) in stages.items():
        for _ in range(rounds):
            number += 1
            for site in sites:
                told = {f"data/{streams[site]}": 8.0, "comm/bytes_up": 1000.0}
                lines.append({"event": "site", "stage": stage, "round": number, "site": site, "values": told})
            lines.append({"event": "round", "stage": stage, "round": number, "site": None, "values": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "site", "st')


def _evaluation(level: float) -> dict[str, Any]:
    found = evaluation(level)
    found["classification"]["few_label_probe"] = found["classification"]["linear_probe"]
    return found
