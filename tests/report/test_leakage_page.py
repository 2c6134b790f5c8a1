"""The audit's page: every number is explained, missing data is said, nothing on it is markup from outside."""

from __future__ import annotations

import copy
import hashlib
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic_audit import SIZES, block, canaries_and_update, found

from fedmix.errors import RunError
from fedmix.report import charts
from fedmix.report.leakage import audited, page_of, rows, write_leakage


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words(path: Path) -> str:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    return " ".join(" ".join(tags.text).replace("\N{NO-BREAK SPACE}", " ").split())


def test_the_page_says_what_was_tried_found_and_meant_with_sample_sizes(tmp_path: Path) -> None:
    text = words(write_leakage(tmp_path / "leakage.html", found()))
    for sentence in (
        "of 5 attacks, better than guessing were whole patients (68 % right); image with report (71 % right); re-linkage (+6.1",
        "not enough data",
        "1,480 members, 1,502 non-members (studies)",
        "More often for training pairs: the model has learnt some of them by heart.",
        "An accounted epsilon below 0.42 would be contradicted by this attack.",
        "88 of 600 members and 31 of 600 non-members accused; the other half of the patients chose from",
        "of a member and a non-member, it tells in 71 % of cases which is the member",
        "difference +6.1 (+2.6 to +9.9) percentage points",
        "model of run demo (demo-0123) weights sha256 abababababababab… audited 23 Nov 2026, 13:05 UTC",
        "None were planted before training.",
        "An audit of a model sees no update.",
    ):
        assert sentence in text


def test_the_page_is_one_file_that_asks_for_nothing_else_and_its_charts_are_described(tmp_path: Path) -> None:
    source = write_leakage(tmp_path / "leakage.html", found()).read_text(encoding="utf-8")
    assert "`" not in source.split("</style>")[1]
    tags = Tags()
    tags.feed(source)
    assert not re.search(r"https?://|@import|url\(", source)
    assert not tags.names & {"script", "link", "img", "iframe"}
    drawings = [ElementTree.fromstring(drawing) for drawing in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]
    assert len(drawings) == 3
    assert "the line at 0.5 is guessing" in drawings[0].get("aria-label", "")
    assert "seeds" not in "".join(drawing.get("aria-label", "") for drawing in drawings)


def test_a_model_is_named_by_its_run_and_its_weights(tmp_path: Path) -> None:
    model, when = tmp_path / "model", datetime(2026, 11, 23, 13, 5, tzinfo=UTC)
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    alone = audited(model, when)
    assert alone == {
        "run": None,
        "run_id": None,
        "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
        "when": "2026-11-23T13:05:00+00:00",
    }
    assert dict(page_of(found(audited=alone)).facts)["model"] == "of no run folder"
    (tmp_path / "manifest.json").write_text('{"name": "demo", "run_id": "demo-0123"}')
    assert (audited(model, when)["run"], audited(model, when)["run_id"]) == ("demo", "demo-0123")
    older = {name: value for name, value in found().items() if name != "audited"}
    assert dict(page_of(older).facts)["model"] == "not recorded"


def test_the_line_of_every_picture_is_at_guessing() -> None:
    by_title = {panel.title: panel for panel in page_of(found(**canaries_and_update())).panels}
    found_first = by_title["Own report found first"]
    start, first = charts.BAR_LEFT, found_first.whiskers[0].x
    assert found_first.line == pytest.approx(start + (first - start) * 0.005 / 0.242)
    assert all("is guessing" in panel.description for panel in by_title.values())


def test_a_control_that_tells_the_groups_apart_takes_the_finding_back() -> None:
    by_title = {finding.title: finding for finding in page_of(found()).findings}
    assert "not all memory" in by_title["Images"].meaning[-1]
    assert "Better than guessing" in by_title["Image with report"].meaning[0]
    assert len(by_title["Image with report"].meaning) == 1
    assert "in up to 52.4 % of cases (guessing: 50 %) is not excluded" in by_title["Reports"].meaning[0]


def test_pairs_that_are_easier_for_a_model_that_saw_none_are_no_memory() -> None:
    values = found()
    values["relinkage"]["control"] = {"difference_r@1": 0.05, "difference_r@1_ci95": [0.02, 0.08]}
    page = page_of(values)
    assert "re-linkage" not in page.verdict[0]
    assert "finds these more often too" in next(one for one in page.findings if one.title == "Re-linkage").meaning[0]
    values["relinkage"]["control"] = {"difference_r@1": 0.0, "difference_r@1_ci95": [-0.01, 0.01]}
    assert "re-linkage" in page_of(values).verdict[0]


def test_what_could_not_be_measured_is_said_and_draws_nothing(tmp_path: Path) -> None:
    reason = "not enough data: 7 patients on the smaller side, at least 20 are needed"
    nothing = {"auc": None, "auc_ci95": None, "tpr@fpr_0.01": None, "tpr@fpr_0.001": None, "reason": reason} | SIZES
    empty = found(
        membership={"text": nothing, "patient": nothing},
        relinkage={"difference_r@1": None, "difference_r@1_ci95": None, "reason": reason},
        epsilon={"lower_bound": None, "reason": reason, "delta": 1e-5, "confidence": 0.95},
    )
    page = page_of(empty)
    assert page.panels == ()
    assert page.verdict[0].startswith("There is not enough data: 7 patients")
    assert all("7 patients" in finding.meaning[0] for finding in page.findings)
    assert len(rows(empty)) == 4
    assert "Not enough data for any picture." in words(write_leakage(tmp_path / "leakage.html", empty))


def test_canaries_and_an_update_are_told_with_what_they_mean(tmp_path: Path) -> None:
    values = found(**canaries_and_update())
    page = page_of(values)
    assert "planted texts (exposed by 4.2 of 9.0 bits)" in page.verdict[0]
    assert "of 7 attacks" in page.verdict[0]
    assert "planted pictures" not in page.verdict[0]
    assert "tells who is in the training (85 % right) and which words its reports use (71 % of them)" in page.verdict[1]
    text = words(write_leakage(tmp_path / "leakage.html", values))
    for sentence in (
        "Learnt by heart where several patients held the same; what a single one held was not told apart.",
        "a little memory may be missed",
        "held by 8 patients 6.9 bits",
        "8 planted among 511 never planted",
        "14.2 dB, others 14.1 dB",
        "Whoever receives this update alone can list words",
    ):
        assert sentence in text
    assert "None were planted" not in text
    assert "An audit of a model sees no update" not in text
    assert {row[0]: row[1] for row in rows(values)}["Planted texts"] == "4.2 bits"
    assert len(page.panels) == 7  # three of the model, two of canaries, members and words of the update


def test_what_one_patient_held_weighs_most() -> None:
    values = found(**canaries_and_update())
    values["canaries"]["texts"]["by_times"]["1"]["p_value"] = 0.001
    meaning = next(one for one in page_of(values).findings if one.title == "Planted texts").meaning[0]
    assert "even what a single patient held" in meaning


def test_an_update_that_tells_nothing_and_a_start_that_knew_are_said() -> None:
    values = found(**canaries_and_update())
    values["update"] = {"membership": {"patient": block(0.505) | {"control": block(0.7)}}}
    page = page_of(values)
    assert "did not tell better than guessing" in page.verdict[1]
    assert "taught it some of these patients" in page.findings[-1].meaning[1]
    values["update"]["membership"]["patient"] |= {"auc": None, "auc_ci95": None, "reason": "not enough data: 7 patients"}
    assert not any("One site's update" in sentence for sentence in page_of(values).verdict)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"has_reference": False}, "No reference model was given"),
        ({"subjects": found()["subjects"] | {"are_alike": False}}, "come from different shards"),
        ({"subjects": found()["subjects"] | {"num_shared_patients_left_out": 3}}, "3 patients of the non-members"),
    ],
)
def test_what_weakens_the_audit_stands_at_the_top(change: dict[str, Any], said: str) -> None:
    assert page_of(found()).warnings == ()
    assert said in page_of(found(**change)).warnings[0]


def test_an_attack_at_chance_is_no_proof_of_safety() -> None:
    values = copy.deepcopy(found())
    for kind in ("patient", "pair"):
        values["membership"][kind] = block(0.505)
    values["relinkage"]["difference_r@1_ci95"] = [-0.01, 0.1]
    verdict = page_of(values).verdict
    assert "none could tell better than guessing who was in the training" in verdict[0]
    assert "no proof of safety" in verdict[1]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="audit the model again"):
        write_leakage(tmp_path / "leakage.html", found(schema=2))
