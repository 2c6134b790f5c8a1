from __future__ import annotations

from typing import Any

from synthetic_run import evaluation, report_values

from fedmix.report import narrative
from fedmix.report.history import Entry, History
from fedmix.report.summary import Report, build_report, parse_report


def report(**changes: Any) -> Report:
    return parse_report(build_report(**report_values(**changes)))


def story(**changes: Any) -> str:
    return " ".join(narrative.what_happened(report(**changes), History()))


def test_story_names_every_baseline_that_is_ahead() -> None:
    better, worse = evaluation(1.0, 1), evaluation(0.1, 2)
    better["regeneration"]["psnr_db"] = 99.0
    better["language"]["bits_per_token"] = 9.0
    for part in ("classification", "retrieval"):
        del better[part]
    text = story(baselines={"fedavg_all": {"evaluation": better}, "random_init": {"evaluation": worse}})
    assert (
        "On 6 measures, compared with 1 other trained method and a model never trained, ahead of it: fedavg all on PSNR."
        in text
    )


def test_story_says_when_no_baseline_is_ahead_and_nothing_where_there_is_none() -> None:
    untrained = story(baselines={"random_init": {"evaluation": evaluation(0.0, 2)}})
    assert "On 6 measures, compared with a model never trained, none is ahead" in untrained
    assert "compared with" not in story(baselines={})


def test_a_small_difference_does_not_read_as_zero_and_zero_has_no_sign() -> None:
    ours = evaluation(0.97, 1)
    ours["regeneration"]["with_report"] |= {"gain_psnr_db": -0.004, "gain_psnr_db_ci95": [-0.0096, -0.0021]}
    ours["language"]["with_image"] |= {"bits_saved": 0.0, "bits_saved_ci95": [-0.5, 0.25]}
    text = story(evaluation=ours)
    assert "changes that by \N{MINUS SIGN}0.004 (\N{MINUS SIGN}0.010 to \N{MINUS SIGN}0.002) dB" in text
    assert "costs by 0.00 (\N{MINUS SIGN}0.25 to +0.50)" in text


def test_story_tells_lost_replies_and_rounds_from_the_metrics() -> None:
    entries = tuple(Entry("round", "masked", number, None, {"num_failed": float(number == 2)}) for number in (1, 2, 3))
    text = " ".join(narrative.what_happened(report(), History(entries)))
    assert "for 3 rounds, in 5 min 12 s" in text
    assert "One reply was lost or refused" in text


def test_story_of_an_empty_evaluation_only_says_who_took_part_and_what_was_sent() -> None:
    empty = report(evaluation={}, baselines={})
    assert narrative.what_happened(empty, History()) == [
        "6 sites took part: 3 with images only, 2 with reports only and 1 with both, 12,450 studies in all.",
        "The sites sent 110 MB; whole float32 models would have been 594 MB, 5.4 times as much.",
    ]


def test_limits_name_the_baselines_that_were_not_run_and_the_missing_privacy_bound() -> None:
    text = " ".join(narrative.limits(report(), "synthetic phantoms"))
    assert "Not compared in this run: best site, paired only or centralised." in text
    assert "No differential privacy bounds" in " ".join(narrative.protection(report()))
    assert "synthetic phantoms" in text
    bounded = {"mode": "dpsgd", "epsilon": 3.0, "delta": 1e-5, "unit": "patient", "accountant": "PRV"}
    assert "epsilon = 3, delta = 1e-05 for each patient, by the PRV accountant" in " ".join(
        narrative.protection(report(privacy=bounded))
    )


def test_protection_says_what_the_coordinator_saw_of_updates_and_what_that_switched_off() -> None:
    assert not [line for line in narrative.protection(report()) if "ecure sum" in line]
    towers = {"shared": {"rounds": 2, "fewest_sites": 3}, "pair": {"rounds": 0, "fewest_sites": 0}}
    secure = {"threshold": 2, "clip": 0.5, "bits": 16, "step": 0.5 / 32767, "rounds": 2, "clipped": 7, "towers": towers}
    said = {"mode": "none", "secure_sum": secure | {"switched_off": ["one thing", "another"]}}
    text = " ".join(narrative.protection(report(privacy=said)))
    assert "sums of 2 sites or more and no site's update, rounded to steps of 1.5e-05 from -0.5 to 0.5 (7 values" in text
    assert "shared in 2 of 2 rounds over 3 sites or more and pair in 0 of 2 rounds; without a sum a part stayed" in text
    assert "Switched off by it: one thing and another." in text


def test_protection_says_what_the_number_of_sites_lets_aggregation_promise() -> None:
    facts = {"rule": "modality_aware", "combine": "mean", "promises": ["image tower, 2 sites: bounded influence and no more."]}
    assert "Against a wrong site, image tower, 2 sites: bounded influence and no more." in narrative.protection(
        report(aggregation=facts)
    )
    assert not any("wrong site" in sentence for sentence in narrative.protection(report()))


def reranked(**changes: Any) -> dict[str, Any]:
    """The synthetic evaluation with a re-ranking beside it."""
    found = evaluation(0.97, 1)
    now = {"r@1": 0.25, "r@5": 0.4, "r@10": 0.45, "gain_r@1": 0.16, "gain_r@1_ci95": [0.12, 0.2]}
    found["retrieval"] |= {"reranked": {"image_to_text": now, "text_to_image": now, "top": 20} | changes}
    return found


def test_re_ranking_is_told_beside_similarity_alone() -> None:
    images, reports = narrative.reranking(report(evaluation=reranked()).evaluation)
    assert images.startswith("With the first 20 in the match head's order, R@1 of images is 25.0 % and was 8.8 % by similarity")
    assert images.endswith("alone: +16.00 (+12.00 to +20.00) points.")
    assert "R@1 of reports is 25.0 %" in reports
    noted = narrative.reranking(report(evaluation=reranked(note="nobody knows")).evaluation)
    assert noted[-1] == "Note: nobody knows."


def test_re_ranking_that_was_not_done_is_silent_unless_it_was_asked_for() -> None:
    assert narrative.reranking(report().evaluation) == []
    asked = evaluation(0.97, 1)
    asked["skipped"] = {"retrieval/reranked": "the model was never trained on matching"}
    assert narrative.reranking(report(evaluation=asked).evaluation) == [
        "Not re-ranked: the model was never trained on matching."
    ]


def test_protection_says_what_an_epsilon_covers_and_by_whose_word() -> None:
    site = {"name": "north", "epsilon": 2.5, "epsilon_rdp": 2.9, "steps": 40.0, "noise_multiplier": 1.1, "sample_rate": 0.05}
    privacy = {
        "mode": "dp",
        "epsilon": 2.5,
        "delta": 1e-5,
        "unit": "patient",
        "relation": "add or remove one patient",
        "accountant": "prv",
        "steps": 40.0,
        "sites": [site],
    }
    text = " ".join(narrative.protection(report(privacy=privacy)))
    assert (
        "epsilon = 2.5, delta = 1e-05 for each patient (add or remove one patient), by the prv accountant after 40 steps"
        in text
    )
    assert "by the sites' own word" in text
    assert "a patient of several sites bears the sum" in text
