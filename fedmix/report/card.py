"""report.md and the model card in Markdown, from the same page as report.html; `fedmix export` puts its card together of the
same parts. Site names and counts are those of report.json; nothing of a site's files, paths or texts is in them.
"""

from __future__ import annotations

from fedmix.report import findings, learning, markdown, measures, narrative, quantities, site_value
from fedmix.report.further import by_finding, further_sets
from fedmix.report.measures import Grid
from fedmix.report.method import STAGE_COLUMNS, Method
from fedmix.report.page import Page
from fedmix.report.readings import other_ways
from fedmix.report.summary import Report

HOLDS = {"image": "images", "text": "reports", "paired": "images with their reports"}
USES = (
    "For research on federated learning from images, reports and pairs: features for classifiers, retrieval between images "
    "and reports, findings asked for in words, regeneration of hidden parts.",
    "For people who will measure it on data of their own before they rely on any number here.",
)
RECORD = (
    "name",
    "run_id",
    "seed",
    "fingerprint",
    "fingerprints",
    "warm_start",
    "commit",
    "versions",
    "hardware",
    "started",
    "finished",
)


def report_markdown(page: Page) -> str:
    """report.md: report.html without its pictures."""
    facts = "; ".join([page.run.state, *(f"{name} {text}" for name, text in page.facts)])
    parts = [f"# {markdown.text(page.run.name)}\n", markdown.text(facts) + "\n"]
    if page.run.state == "failed":
        parts.append(f"This run failed: {markdown.text(page.run.cause or 'it recorded no cause')}\n")
    if page.story:
        parts.append(markdown.text(" ".join(page.story)) + "\n")
    parts += ["## Results\n", results(page.report)]
    if page.gaps:
        gaps = "; ".join(f"{title} {text}" for title, text in page.gaps)
        parts.append(f"Recovered gap from the best single site to pooled data: {markdown.text(gaps)}. Point estimates.\n")
    parts += ["## Method\n", method(page.method, page.method_absence), "## Sites\n", sites(page.report)]
    if page.site_value or page.contributions:
        parts += ["## What each hospital gave and got\n", site_value.as_markdown(page.site_value, page.contributions)]
    parts += _ending(page)
    return "\n".join(parts)


def model_card(page: Page) -> str:
    """model_card.md: what the run's model is for, what it was trained on, how it did, and what it is not for."""
    phantoms_only = page.method.phantoms_only if page.method else False
    parts = [
        f"# Model card: {markdown.text(page.run.name)}\n",
        "## Intended use\n",
        markdown.items(USES),
        "## Training data\n",
        training(page.report, phantoms_only=phantoms_only),
        "## Training\n",
        method(page.method, page.method_absence),
        "## Evaluation\n",
        evaluation(page.report),
        "## Limits of the model\n",
        limits(page.report, phantoms_only=phantoms_only),
        *_ending(page),
    ]
    return "\n".join(parts)


def results(report: Report | None) -> str:
    """The headline table, with intervals and sample sizes, and one of each further held-out set."""
    if report is None or not report.evaluation.model_fields_set:
        return "There is no evaluation: the run ended before its model was judged.\n"
    parts = [
        _table(measures.headline(report)),
        markdown.items(
            [*findings.notes(report.evaluation.classification), *other_ways(report.evaluation), *by_finding(report.evaluation)]
        ),
    ]
    for one in further_sets(report):
        parts += [f"### On {markdown.text(one.name)}\n", _table(one.grid), markdown.items(one.sentences)]
    return "\n".join(part for part in parts if part)


def _table(grid: Grid) -> str:
    """A table of methods and what was measured on: all of them, or the first where others differ."""
    settings = [shared or (own.setting if own else "") for shared, own in zip(grid.settings, grid.rows[0].cells, strict=True)]
    sizes = [f"{one.title}: {setting}" for one, setting in zip(grid.measures, settings, strict=True) if setting]
    measured = f"\nMeasured on: {markdown.text('; '.join(sizes))}.\n" if sizes else ""
    return measures.as_markdown(grid) + measured


def evaluation(report: Report | None) -> str:
    """The same with a sentence on what it is."""
    if report is None:
        return "None came with the model; `fedmix evaluate` measures it on prepared shards.\n"
    return (
        "On held-out studies of patients that no site trained on, 95 % intervals over patients; the best of each column is "
        "bold. Baselines and guesses that need no model stand beside it.\n\n" + results(report)
    )


def training(report: Report | None, *, phantoms_only: bool) -> str:
    """How many sites of each kind with how many studies, and the table of them."""
    if report is None:
        return "Not known: the model was exported from outside a completed run.\n"
    counts = []
    for stream in learning.STREAMS:
        studies = [site.studies or 0 for site in report.sites if site.stream == stream]
        if studies:
            held = quantities.count(sum(studies))
            counts.append(f"{quantities.plural(len(studies), 'site')} with {HOLDS[stream]} ({held} studies)")
    rounds = "" if report.run.rounds is None else f" {quantities.plural(report.run.rounds, 'round')}."
    source = " All of them are synthetic phantoms." if phantoms_only else ""
    return f"{quantities.listing(counts)}.{rounds}{source}\n\n{sites(report)}"


def sites(report: Report | None) -> str:
    """The table of sites."""
    if report is None or not report.sites:
        return "What each site held was not recorded.\n"
    rows = [
        (
            site.name,
            HOLDS.get(site.stream, site.stream),
            quantities.count(site.studies),
            quantities.count(site.examples),
            quantities.size(site.bytes_up),
            quantities.size(site.bytes_down),
        )
        for site in report.sites
    ]
    return markdown.table(("site", "holds", "studies", "examples seen", "sent", "received"), rows, num_words=2)


def method(found: Method | None, absence: str) -> str:
    """The method card."""
    if found is None:
        return f"{absence}\n"
    stages = markdown.table(STAGE_COLUMNS, found.stages, num_words=len(STAGE_COLUMNS))
    return f"{stages}\n{markdown.items([f'{name}: {text}.' for name, text in found.facts])}"


def limits(report: Report | None, *, phantoms_only: bool) -> str:
    """What the model is not for, and what its weights may reveal."""
    source = (
        "It was trained on drawings, not on patients: no number above says anything about real radiographs."
        if phantoms_only
        else "It knows the sites it was trained on; on other devices, patients or languages it may do worse, so measure first."
    )
    return markdown.items(
        (
            "Not a medical device; not for diagnosis, treatment or triage.",
            source,
            "Regenerated images and filled-in words are the model's guesses and show nothing that was in the patient.",
            "Similarities compare given texts with each other; they are no probabilities of disease.",
            _leak(report),
        )
    )


def record(manifest: tuple[tuple[str, str], ...]) -> str:
    """Versions, fingerprints and hardware, of the manifest's rows."""
    rows = [(path, value) for path, value in manifest if path.split(" / ")[0] in RECORD]
    return markdown.table(("manifest.json", ""), rows, num_words=2) if rows else "The run folder holds no manifest.json.\n"


def _ending(page: Page) -> list[str]:
    """What both pages end with."""
    if page.report is None:
        return ["## Record\n", record(page.manifest)]
    cost = f"Took {quantities.duration(page.report.timing.wall_s)}. {narrative.energy(page.report)}"
    return [
        "## Privacy\n",
        markdown.items(page.protection),
        "## Time and energy\n",
        markdown.text(cost) + "\n",
        "## Limits of the run\n",
        markdown.items(page.limits),
        "## Record\n",
        record(page.manifest),
    ]


def _leak(report: Report | None) -> str:
    privacy = report.privacy if report else None
    if privacy is None or privacy.mode == "none":
        told = (
            "Updates were not protected by differential privacy" if privacy else "Whether updates were protected is not known"
        )
        return f"{told}: the weights may reveal something of the training data."
    spent = "" if privacy.epsilon is None else f", epsilon {privacy.epsilon:.3g} at delta {privacy.delta} per {privacy.unit}"
    return f"Differential privacy: {privacy.mode}{spent}."
