from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmix.data import phantom
from fedmix.data.reports import labeller
from fedmix.data.reports.labeller import DOUBTED, FINDINGS, NOT_SAID, SAID
from fedmix.data.tokenizer import Tokenizer


def found(report: str) -> dict[str, float]:
    """What is said or doubted; what is not said is left out."""
    return {finding: said for finding, said in zip(FINDINGS, labeller.read(report), strict=True) if said != NOT_SAID}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Moderate cardiomegaly with a small left pleural effusion.", {"cardiomegaly": SAID, "effusion": SAID}),
        ("The heart is mildly enlarged.", {"cardiomegaly": SAID}),
        ("The heart is not enlarged. Heart size is normal.", {}),
        ("No focal consolidation, pleural effusion or pneumothorax.", {}),
        ("No focal consolidation, large pleural effusion or pneumothorax is seen.", {}),
        ("No pneumothorax, mild cardiomegaly.", {"cardiomegaly": SAID}),
        ("No pneumothorax but a tiny effusion remains.", {"effusion": SAID}),
        ("The lungs are clear of consolidation. Costophrenic angles are sharp.", {}),
        ("Effusion is not seen. The pneumothorax has resolved.", {}),
        ("Negative for fracture. Without edema.", {}),
        ("Rule out pneumonia. History of effusion. Evaluate for pneumothorax.", {}),
        ("Possible left lower lobe pneumonia.", {"consolidation": DOUBTED}),
        ("A small pneumothorax cannot be excluded.", {"pneumothorax": DOUBTED}),
        ("We cannot rule out a nodule.", {"nodule": DOUBTED}),
        ("Patchy opacity which may represent atelectasis.", {"consolidation": SAID, "atelectasis": DOUBTED}),
        ("Possible effusion. Definite right effusion on the lateral film.", {"effusion": SAID}),
        ("No change in the left effusion.", {"effusion": SAID}),
        ("Endotracheal tube above the carina; dual lead pacemaker.", {"tube": SAID, "pacemaker": SAID}),
        ("no lines or tubes . no implanted device .", {}),
        ("", {}),
    ],
)
def test_a_report_is_read_with_its_denials_doubts_and_questions(report: str, expected: dict[str, float]) -> None:
    assert found(report) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("No pleural effusion or pneumothorax.", {"effusion", "pneumothorax"}),
        ("The heart is not enlarged. Effusion is not seen.", {"cardiomegaly", "effusion"}),
        ("No pneumothorax but a tiny effusion remains.", {"pneumothorax"}),
        ("No left effusion. Small right effusion.", {"effusion"}),
        ("Rule out pneumonia. History of effusion. Evaluate for pneumothorax.", set()),
        ("A small pneumothorax cannot be excluded. Possible nodule.", set()),
        ("Heart size is normal.", set()),  # it names no finding
    ],
)
def test_what_a_report_denies_is_told_from_what_it_leaves_unsaid(report: str, expected: set[str]) -> None:
    assert {finding for finding, is_denied in zip(FINDINGS, labeller.denied(report), strict=True) if is_denied} == expected


@given(st.text(max_size=200))
def test_any_text_is_read_as_one_number_for_each_finding(text: str) -> None:
    read = labeller.read(text)
    assert len(read) == len(FINDINGS)
    assert set(read) <= {SAID, DOUBTED, NOT_SAID}


@given(st.sampled_from(sorted(labeller.PHRASES)), st.sampled_from(["no", "without", "negative for", "rule out"]))
def test_a_denied_finding_is_as_good_as_a_silent_report(finding: str, denial: str) -> None:
    name = {"tube": "endotracheal tube"}.get(finding, finding)
    assert found(f"There is {name}.") == {finding: SAID}
    assert found(f"{denial} {name}.") == {}


@pytest.mark.parametrize("look", ["west", "heights", "unseen"])
def test_it_finds_what_phantom_reports_say_and_nothing_else(look: str) -> None:
    """Whole reports as the tokenizer gives them back; sides are one finding, and a hedge is a finding.

    The rules were written by one who knew the grammar: this says that they and it agree, and nothing of real reports.
    """
    drawn = phantom.generate(300, look=look, seed=11, images=False)
    tokenizer = Tokenizer.load()
    assert drawn.reports is not None
    texts = [tokenizer.decode(ids) for ids in tokenizer.encode(drawn.reports, 512)]
    read = np.array([labeller.read(text) for text in texts]) > NOT_SAID
    kinds = [label.partition("_")[0] for label in phantom.LABELS]
    for place, finding in enumerate(FINDINGS):
        columns = [column for column, kind in enumerate(kinds) if kind == finding]
        present = drawn.labels[:, columns].any(axis=1)
        np.testing.assert_array_equal(read[:, place], present, err_msg=finding)
