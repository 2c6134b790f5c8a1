"""report.html, with report.md and a model card beside it: one file that anyone can open, from what a run folder holds.

Self-contained by construction: styles and charts are in the page, pictures are data addresses, a content security policy
forbids everything else, and nothing needs a script. Every value passes through jinja2 with autoescape on. What a run does
not have is left out with a sentence that says so; a failed run has a report too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmix.errors import RunError
from fedmix.report import card, charts, comparison, learning, measures, quantities, site_value, study_value
from fedmix.report.attacked import MARKED
from fedmix.report.files import write_text
from fedmix.report.forest import forest
from fedmix.report.method import STAGE_COLUMNS
from fedmix.report.page import read_page
from fedmix.report.pages import environment
from fedmix.report.study import Study


def write_report(run_dir: Path) -> Path:
    """Write report.html, report.md and model_card.md into a run folder; returns the path of the first.

    Raises RunError if the folder holds no run.
    """
    page = read_page(run_dir)
    path = run_dir / "report.html"
    template = environment().get_template("report.html.j2")
    drawn = template.render(
        page=page, charts=charts, quantities=quantities, streams=learning.STREAMS, columns=STAGE_COLUMNS, site_value=site_value
    )
    write_text(path, drawn)
    write_text(run_dir / "report.md", card.report_markdown(page))
    if page.report is not None:
        write_text(run_dir / "model_card.md", card.model_card(page))
    return path


def write_comparison(path: Path, runs: comparison.SideBySide) -> Path:
    """Write the table that compares single runs, as Markdown for a path that ends in .md and as HTML otherwise."""
    if path.suffix == ".svg":
        raise RunError("a picture shows the differences of a study; for single runs write .md or .html")
    if path.suffix == ".md":
        write_text(path, f"{runs.warning}\n\n{measures.as_markdown(runs.grid)}".lstrip())
    else:
        write_text(path, environment().get_template("compare.html.j2").render(grid=runs.grid, warning=runs.warning))
    return path


def write_study(path: Path, studies: Sequence[Study]) -> Path:
    """Write what compares the methods of studies: Markdown for .md, one picture of one study for .svg, HTML otherwise."""
    if path.suffix == ".svg":
        return _write_forest(path, studies)
    comparisons = [comparison.compared(study) for study in studies]
    if path.suffix == ".md":
        write_text(path, comparison.as_markdown(comparisons))
    else:
        template = environment().get_template("study.html.j2")
        drawn = template.render(
            comparisons=comparisons,
            charts=charts,
            costs=comparison.COSTS,
            gap_sentence=comparison.gap_sentence,
            marked=MARKED,
            in_favour=comparison.IN_FAVOUR,
            against=comparison.AGAINST,
            study_value=study_value,
        )
        write_text(path, drawn)
    return path


def _write_forest(path: Path, studies: Sequence[Study]) -> Path:
    if len(studies) != 1:
        raise RunError(f"a picture holds one study, {len(studies)} were given; write one .svg for each")
    figure = forest(studies[0])
    if not figure.blocks:
        raise RunError(f"study {studies[0].name!r} has no method beside the main one yet; there is no difference to draw")
    write_text(path, environment().get_template("forest.svg.j2").render(figure=figure))
    return path
