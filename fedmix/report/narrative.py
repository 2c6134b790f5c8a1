"""What happened, in sentences built from the numbers: who took part, what the model can do, where it is behind.

A sentence whose numbers are missing is not written. Nothing is called good or bad: each number stands beside chance or
beside the method it is compared with, and every baseline that is ahead is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fedmix.privacy import PROMISES
from fedmix.report import measures, quantities
from fedmix.report.evaluated import Evaluation, Regeneration, Reranked
from fedmix.report.history import History
from fedmix.report.measures import MEASURES, Measure
from fedmix.report.summary import Report

HOLDINGS = {"image": "with images only", "text": "with reports only", "paired": "with both"}
UNTRAINED = {"random_init": "a model never trained", "public_init": "public start weights never trained here"}
EXPECTED_BASELINES = ("best_site", "fedavg_all", "paired_only", "centralised")  # the least that a claim has to stand beside


def what_happened(report: Report, history: History) -> list[str]:
    """The paragraph at the top of a report, sentence by sentence."""
    return [
        *_who(report),
        *_training(report, history),
        *_abilities(report.evaluation),
        *_standing(report),
        *_traffic(report),
    ]


def reranking(evaluation: Evaluation) -> list[str]:
    """What the match head does to the order of the first candidates, or why it was not asked; nothing if not wanted."""
    if "retrieval/reranked" in evaluation.skipped:
        return [f"Not re-ranked: {evaluation.skipped['retrieval/reranked']}."]
    retrieval = evaluation.retrieval
    found = retrieval and retrieval.reranked
    if not retrieval or not found:
        return []
    both = (
        ("images", retrieval.image_to_text, found.image_to_text),
        ("reports", retrieval.text_to_image, found.text_to_image),
    )
    sentences = [
        f"With the first {found.top} in the match head's order, R@1 of {queries} is {quantities.percent(now.recall_1)} and was "
        f"{quantities.percent(then.recall_1)} by similarity alone{_points(now)}."
        for queries, then, now in both
        if then and now
    ]
    return [*sentences, f"Note: {found.note}."] if found.note else sentences


def _points(found: Reranked) -> str:
    """The gain at the first place in percentage points, with its interval."""
    if found.gain_1 is None:
        return ""
    interval = found.gain_1_ci95 and (100 * found.gain_1_ci95[0], 100 * found.gain_1_ci95[1])
    return f": {_signed(100 * found.gain_1, interval or None)} points"


def limits(report: Report, source: str | None) -> list[str]:
    """What this run cannot tell, from what it did and did not do."""
    return [
        *_data_limits(source),
        *_seed_limits(report),
        *_baseline_limits(report),
    ]


def protection(report: Report) -> list[str]:
    """What left the sites, what bounds what it tells, and what a wrong site can do."""
    return [
        "A site sends its changes to the parameters it trains, how many studies and examples stand behind them, its times and, "
        "without differential privacy, its losses. Pictures, reports, patient numbers and file names stay with it.",
        *_score_limits(report),
        *_privacy_limits(report),
        *_secure_limits(report),
        *_trust_limits(report),
    ]


def energy(report: Report) -> str:
    """What the run took in electricity, as a range with the way it was reckoned, or why that is not known."""
    found = report.energy
    if found is None:
        return "Energy was not estimated in this run."
    if found.kwh is None:
        return f"Energy was not estimated: {found.reason}."
    low, high = (f"{value:.2g}" for value in found.kwh)
    return f"Energy: an estimated {low} to {high} kWh ({found.how})."


def _who(report: Report) -> Iterator[str]:
    if not report.sites:
        return
    kinds = Counter(site.stream for site in report.sites)
    parts = [f"{number} {HOLDINGS.get(stream, 'with ' + stream + ' data')}" for stream, number in kinds.items()]
    studies = [site.studies for site in report.sites if site.studies is not None]
    held = f", {sum(studies):,} studies in all" if len(studies) == len(report.sites) else ""
    yield f"{quantities.plural(len(report.sites), 'site')} took part: {quantities.listing(parts)}{held}."


def _training(report: Report, history: History) -> Iterator[str]:
    closed = {entry.round for entry in history.of("round")}
    if not closed:
        return
    spans = [f"{span.name}, {quantities.plural(span.last - span.first + 1, 'round')}" for span in history.stages]
    stages = f" in {quantities.plural(len(spans), 'stage')} ({'; '.join(spans)})" if len(spans) > 1 else ""
    wall = "" if report.timing.wall_s is None else f", in {quantities.duration(report.timing.wall_s)}"
    yield f"They trained one shared model for {quantities.plural(len(closed), 'round')}{stages}{wall}."
    if failures := int(history.total("round", "num_failed")):
        lost = "One reply was" if failures == 1 else f"{failures:,} replies were"
        yield f"{lost} lost or refused on the way; the rounds went on with the other sites."


def _abilities(evaluation: Evaluation) -> Iterator[str]:
    zero_shot, probe, _, _, psnr, _ = (measure.read(evaluation).value for measure in MEASURES)
    if zero_shot is not None:
        also = "" if probe is None else f"; a linear probe on its image features reaches {probe:.3f}"
        yield f"Asked in words (zero-shot), it tells findings apart at a macro AUROC of {zero_shot:.3f}{also} (chance: 0.5)."
    elif probe is not None:
        yield f"A linear probe on its image features reaches a macro AUROC of {probe:.3f} (chance: 0.5)."
    ranking = evaluation.retrieval and evaluation.retrieval.image_to_text
    if ranking and ranking.recall_10 is not None and ranking.gallery:
        share, chance = quantities.percent(ranking.recall_10), quantities.percent(measures.chance_at_10(ranking))
        picked = f"among the first ten it picks out of {ranking.gallery:,}"
        yield f"For {share} of the images, their own report is {picked} (chance: {chance})."
    if psnr is not None and evaluation.regeneration:
        yield f"It regenerates hidden image patches at {psnr:.1f} dB{_best_guess(evaluation.regeneration)}."
    yield from _across(evaluation)


def _best_guess(regeneration: Regeneration) -> str:
    guesses = {name: guess.psnr_db for name, guess in regeneration.baselines.items() if guess.psnr_db is not None}
    if not guesses:
        return ""
    name = max(guesses, key=lambda guess: guesses[guess])
    return f"; the best guess without a model ({measures.method_name(name)}) reaches {guesses[name]:.1f} dB"


def _across(evaluation: Evaluation) -> Iterator[str]:
    """What one kind of data adds to the other, measured on the same hidden patches and words."""
    told = evaluation.regeneration and evaluation.regeneration.with_report
    if told and told.gain_psnr_db is not None:
        gain = _signed(told.gain_psnr_db, told.gain_psnr_db_ci95)
        yield f"Reading the report as well changes that by {gain} dB."
    seen = evaluation.language and evaluation.language.with_image
    if seen and seen.bits_saved is not None:
        saved = _signed(-seen.bits_saved, seen.bits_saved_ci95 and (-seen.bits_saved_ci95[1], -seen.bits_saved_ci95[0]))
        yield f"Seeing the image changes the bits that a hidden word costs by {saved}."


def _signed(value: float, interval: tuple[float, float] | None) -> str:
    """With as many digits as it takes that neither the value nor an end reads as zero, four at most."""
    numbers = (value, *(interval or ()))
    digits = next((digits for digits in (2, 3) if all(round(number, digits) for number in numbers if number)), 4)
    told, *ends = (quantities.signed(number, digits) for number in numbers)
    return f"{told} ({ends[0]} to {ends[1]})" if ends else told


def _standing(report: Report) -> Iterator[str]:
    """Every baseline that is ahead, and on which measures."""
    ahead: dict[str, list[str]] = {name: [] for name in report.baselines}
    num_compared = 0
    for measure in MEASURES:
        ours = measure.read(report.evaluation).value
        theirs = {name: measure.read(baseline.evaluation).value for name, baseline in report.baselines.items()}
        known = {name: value for name, value in theirs.items() if value is not None}
        if ours is None or not known:
            continue
        num_compared += 1
        for name, value in known.items():
            if _beats(measure, value, ours):
                ahead[name].append(_lower_first(measure.title))
    if num_compared:
        leaders = [
            f"{measures.method_name(name)} on {_which(titles, num_compared)}" for name, titles in ahead.items() if titles
        ]
        verdict = f"ahead of it: {'; '.join(leaders)}" if leaders else "none is ahead of it on any of them"
        yield f"On {quantities.plural(num_compared, 'measure')}, compared with {_others(list(ahead))}, {verdict}."


def _others(names: Sequence[str]) -> str:
    """How many trained methods, and by name what was not trained here."""
    untrained = [UNTRAINED[name] for name in names if name in UNTRAINED]
    num_trained = len(names) - len(untrained)
    return quantities.listing([quantities.plural(num_trained, "other trained method")] * bool(num_trained) + untrained)


def _which(titles: Sequence[str], num_compared: int) -> str:
    """One or two measures by name, more by their number."""
    return quantities.listing(titles) if len(titles) < 3 else f"{len(titles)} of {num_compared}"


def _beats(measure: Measure, theirs: float, ours: float) -> bool:
    return theirs > ours if measure.better == "higher" else theirs < ours


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() or text[1:2] in "@S" else text[0].lower() + text[1:]


def _traffic(report: Report) -> Iterator[str]:
    sent, full = report.communication.bytes_up, report.communication.bytes_full_fp32
    if sent is None:
        return
    ratio = (
        f"; whole float32 models would have been {quantities.size(full)}, {full / sent:.1f} times as much"
        if full and sent
        else ""
    )
    yield f"The sites sent {quantities.size(sent)}{ratio}."


def _data_limits(source: str | None) -> Iterator[str]:
    if source == "synthetic phantoms":
        yield (
            "The studies are synthetic phantoms: drawn pictures with generated sentences. The numbers compare methods; "
            "they do not say how well any of them reads a real radiograph."
        )
    yield "This is research software, not a medical device; nothing here supports a decision about a patient."


def _seed_limits(report: Report) -> Iterator[str]:
    seed = "one seed" if report.run.seed is None else f"one seed ({report.run.seed})"
    yield f"This is one run with {seed}. A claim needs three seeds or more; differences inside the intervals may be chance."


def _baseline_limits(report: Report) -> Iterator[str]:
    missing = [measures.method_name(name) for name in EXPECTED_BASELINES if name not in report.baselines]
    if missing:
        yield f"Not compared in this run: {_either(missing)}."


def _score_limits(report: Report) -> Iterator[str]:
    """What left the sites beside their updates, where they scored the model."""
    if any(site.scores for site in report.sites):
        yield (
            "Sites scored the last model on patients that they never trained on, and sent sums and weights, none of "
            "few such patients. No noise covers these sums."
        )


def _privacy_limits(report: Report) -> Iterator[str]:
    privacy = report.privacy
    if privacy.epsilon is None:
        yield f"Privacy mode: {privacy.mode}. No differential privacy bounds what the shared model tells about a study."
        return
    delta = "" if privacy.delta is None else f", delta = {privacy.delta:g}"
    unit = f" for each {privacy.unit}" if privacy.unit else ""
    accountant = f", by the {privacy.accountant} accountant" if privacy.accountant else ""
    relation = f" ({privacy.relation})" if privacy.relation else ""
    of = "steps" if privacy.unit != "site" else "rounds"
    steps = f" after {privacy.steps:.0f} {of}" if privacy.steps else ""
    yield f"Privacy mode: {privacy.mode}, epsilon = {privacy.epsilon:.3g}{delta}{unit}{relation}{accountant}{steps}."
    if privacy.mode in PROMISES:
        yield PROMISES[privacy.mode].limits


def _secure_limits(report: Report) -> Iterator[str]:
    """What the coordinator saw of updates, and what could not be looked at for it."""
    secure = report.privacy.secure_sum
    if secure is None:
        return
    yield (
        f"Secure sum: the coordinator saw sums of {secure.threshold} sites or more and no site's update, rounded to steps of "
        f"{secure.step:.2g} from {-secure.clip:g} to {secure.clip:g} ({secure.clipped} values were cut to that). Counts, "
        "losses and times were each site's own."
    )
    seen = [
        f"{tower} in {one.rounds} of {secure.rounds} rounds" + (f" over {one.fewest_sites} sites or more" if one.rounds else "")
        for tower, one in secure.towers.items()
    ]
    yield f"Sums by part of the model: {quantities.listing(seen)}; without a sum a part stayed as it was."
    yield f"Switched off by it: {quantities.listing(secure.switched_off)}. A wrong site is bounded by that range alone."


def _trust_limits(report: Report) -> Iterator[str]:
    """What a wrong or malicious site can do, which the number of sites decides."""
    if report.aggregation is not None:
        yield from (f"Against a wrong site, {promise}" for promise in report.aggregation.promises)


def _either(names: Sequence[str]) -> str:
    return quantities.listing(names).replace(" and ", " or ")
