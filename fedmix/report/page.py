"""What the pages of a run show, read from its folder and checked; no word of how it is drawn.

What a run does not have is left out with a sentence that says so; a run that failed has pages too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fedmix.errors import RunError
from fedmix.report import charts, findings, learning, measures, narrative, quantities, site_value
from fedmix.report.examples import Examples, load_examples
from fedmix.report.files import read_json
from fedmix.report.findings import Findings
from fedmix.report.further import FurtherSet, by_finding, further_sets
from fedmix.report.history import read_history
from fedmix.report.learning import Section
from fedmix.report.measures import Grid
from fedmix.report.method import Method, read_method
from fedmix.report.readings import Readings, other_ways, readings
from fedmix.report.summary import Report, Run, parse_report

MAX_CONFIG_BYTES = 1 << 18
ABSOLUTE_PATH = re.compile(r"(?m)^(.*: ['\"]?)/.*$")  # of which every value has a line of its own in to_yaml
REST = "all else: start, sending, waiting, other methods"


@dataclass(frozen=True)
class TimeShare:
    """A part of the wall time; ``share`` is None where parts overlap and so do not add up to the whole."""

    name: str
    text: str
    share: float | None


@dataclass(frozen=True)
class Page:
    """Everything the template draws."""

    run: Run
    facts: tuple[tuple[str, str], ...]
    story: tuple[str, ...]
    report: Report | None
    grid: Grid | None
    strips: tuple[charts.Strip, ...]
    gaps: tuple[tuple[str, str], ...]
    losses: Section
    central: Section
    findings: Findings
    readings: Readings
    other_ways: tuple[str, ...]
    reranking: tuple[str, ...]
    by_finding: tuple[str, ...]
    further: tuple[FurtherSet, ...]
    examples: Examples | None
    examples_absence: str
    absences: Mapping[str, int]
    site_value: tuple[site_value.Line, ...]
    contributions: tuple[str, ...]
    times: tuple[TimeShare, ...]
    limits: tuple[str, ...]
    every_number: tuple[tuple[str, ...], list[tuple[str, list[str]]]] | None
    method: Method | None
    method_absence: str
    protection: tuple[str, ...]
    energy: str
    overhead: str
    config: str
    manifest: tuple[tuple[str, str], ...]


def read_page(run_dir: Path) -> Page:
    """What the report of a run shows; raises RunError if there is neither a report nor a manifest."""
    manifest, values = read_json(run_dir / "manifest.json"), read_json(run_dir / "report.json")
    if manifest is None and values is None:
        raise RunError(f"{run_dir} holds neither report.json nor manifest.json; give the folder of a run, such as runs/demo")
    report = None if values is None else parse_report(values, source="report.json")
    run = report.run if report else _run_of_manifest(manifest, run_dir.name)
    history = read_history(run_dir / "metrics.jsonl")
    examples, examples_absence = _examples(run_dir / "evaluation")
    method, method_absence = read_method(run_dir / "config.yaml")
    has_evaluation = report is not None and bool(report.evaluation.model_fields_set)
    grid = measures.headline(report) if report and (has_evaluation or report.baselines) else None
    return Page(
        run=run,
        facts=tuple(_facts(run, report)),
        story=tuple(narrative.what_happened(report, history)) if report else (),
        report=report,
        grid=grid,
        strips=charts.strips(grid) if grid else (),
        gaps=tuple(_gaps(report)) if report else (),
        losses=learning.losses(
            history, history.streams() | ({site.name: site.stream for site in report.sites} if report else {})
        ),
        central=learning.central(history),
        findings=findings.findings(report.evaluation.classification if report else None),
        readings=readings(report.evaluation if report else None),
        other_ways=tuple(other_ways(report.evaluation)) if report else (),
        reranking=tuple(narrative.reranking(report.evaluation)) if report else (),
        by_finding=tuple(by_finding(report.evaluation)) if report else (),
        further=further_sets(report) if report else (),
        examples=examples,
        examples_absence=examples_absence,
        absences=history.absences(),
        site_value=site_value.lines(report) if report else (),
        contributions=site_value.contributions(report) if report else (),
        times=tuple(_times(report)) if report else (),
        limits=tuple(narrative.limits(report, examples.source if examples else None)) if report else (),
        every_number=measures.every_number(report) if report and has_evaluation else None,
        method=method,
        method_absence=method_absence,
        protection=tuple(narrative.protection(report)) if report else (),
        energy=narrative.energy(report) if report else "",
        overhead=_overhead(report) if report else "",
        config=_config(run_dir / "config.yaml"),
        manifest=read_manifest(run_dir),
    )


def read_manifest(run_dir: Path) -> tuple[tuple[str, str], ...]:
    """manifest.json as rows of path and text, moments in ISO 8601; none where there is no such file."""
    values = read_json(run_dir / "manifest.json")
    if isinstance(values, Mapping):
        values = {name: quantities.iso(item) if _is_moment(name, item) else item for name, item in values.items()}
    return tuple(_flat(values or {}))


def _is_moment(name: str, value: Any) -> TypeGuard[float]:
    return name in ("started", "finished") and isinstance(value, int | float)


def _run_of_manifest(manifest: Any, folder: str) -> Run:
    """A run that has no report yet: running, or failed before it could write one."""
    values = manifest if isinstance(manifest, Mapping) else {}
    state = values.get("state")
    return Run(
        name=str(values.get("name") or folder),
        state=state if state in ("running", "completed", "failed") else "running",
        cause=str(values["cause"]) if values.get("cause") else None,
        seed=values["seed"] if isinstance(values.get("seed"), int) else None,
        started=_moment_of(values, "started"),
        finished=_moment_of(values, "finished"),
    )


def _moment_of(values: Mapping[str, Any], key: str) -> float | str | None:
    value = values.get(key)
    return value if isinstance(value, float | str) else float(value) if isinstance(value, int) else None


def _facts(run: Run, report: Report | None) -> list[tuple[str, str]]:
    """The line under the title."""
    facts = [("started", quantities.moment(run.started)), ("finished", quantities.moment(run.finished))]
    facts.append(("took", quantities.duration(report.timing.wall_s if report else None)))
    facts.append(("seed", quantities.DASH if run.seed is None else str(run.seed)))
    return [fact for fact in facts if fact[1] != quantities.DASH]


def _gaps(report: Report) -> list[tuple[str, str]]:
    gaps = measures.recovered_gap(report)
    return [(measure.title, "not defined" if gap is None else f"{100 * gap:.0f} %") for measure, gap in gaps]


def _examples(folder: Path) -> tuple[Examples | None, str]:
    try:
        return load_examples(folder), ""
    except RunError as error:
        return None, str(error)


def _times(report: Report) -> list[TimeShare]:
    """Where the wall time went; sites that train side by side may add up to more than the wall, and then nothing is a share."""
    timing = report.timing
    parts = {"training at the sites": timing.local_train_s, "aggregation": timing.aggregate_s, "evaluation": timing.evaluate_s}
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    wall, total = timing.wall_s or 0.0, sum(known.values())
    fits = 0 < total <= wall * 1.001
    shares = [TimeShare(name, quantities.duration(value), value / wall if fits else None) for name, value in known.items()]
    if fits:
        shares.append(TimeShare(REST, quantities.duration(max(wall - total, 0.0)), max(1 - total / wall, 0.0)))
    return shares


def _overhead(report: Report) -> str:
    """What rounds took beyond training, in a sentence; nothing where it was not measured."""
    ratio = report.timing.overhead_ratio
    if ratio is None:
        return ""
    more = f"{quantities.percent(ratio - 1)} longer than" if ratio > 1 else "as long as"
    return f"The rounds took {more} the time in which at least one site was training; the rest is sending and adding up."


def _config(path: Path) -> str:
    """The resolved config as written in the run folder, without paths of the machine it ran on; nothing where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return ABSOLUTE_PATH.sub(r"\1(a path of the machine that ran it)", file.read(MAX_CONFIG_BYTES))
    except OSError:
        return ""


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of path and text."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{path} / {key}" if path else str(key))]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, quantities.DASH if value is None else str(value))]
