import pytest

from fedmix.data.reports import clean, pick, sections_of
from fedmix.errors import DataError

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___F with cough, evaluate for pneumonia.

 TECHNIQUE:  Portable AP.

 COMPARISON:  Chest radiograph ___.

 FINDINGS:

 The heart is large.  BP: 120 is not a heading here.
 No effusion.

 IMPRESSION:

 1. Cardiomegaly.
 2. No change since ___.
"""


def picked(text: str, *wanted: str) -> str:
    return clean(pick(text, wanted or ("findings", "impression")))


def test_a_report_of_mimic_cxr_falls_into_its_sections() -> None:
    sections = {name: clean(text) for name, text in sections_of(MIMIC).items()}
    assert sections == {
        "other": "FINAL REPORT",
        "technique": "CHEST (PORTABLE AP) Portable AP.",
        "indication": "___F with cough, evaluate for pneumonia.",
        "comparison": "Chest radiograph ___.",
        "findings": "The heart is large. BP: 120 is not a heading here. No effusion.",
        "impression": "1. Cardiomegaly. 2. No change since ___.",
    }


def test_sections_come_in_the_order_asked_for() -> None:
    assert picked(MIMIC, "impression", "comparison") == "1. Cardiomegaly. 2. No change since ___. Chest radiograph ___."
    assert picked(MIMIC, "whole") == clean(MIMIC)


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("IMPRESSION", "impression"),
        ("IMPRESSOIN", "impression"),
        ("MPRESSION", "impression"),
        ("IMOPRESSION", "impression"),
        ("Conclusion", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINIDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PA AND LATERAL VIEWS OF THE CHEST", "findings"),
        ("PORTABLE AP CHEST RADIOGRAPH", "findings"),
        ("IDICATION", "indication"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL HISTORY", "indication"),
        ("COMPARISION", "comparison"),
        ("Hallazgos", "findings"),
        ("IMPRESIÓN DIAGNÓSTICA", "impression"),
        ("DATOS CLÍNICOS", "indication"),
        ("RECOMMENDATION(S)", "other"),
    ],
)
def test_headings_are_known_by_their_meaning_even_misspelt(heading: str, section: str) -> None:
    assert sections_of(f"{heading}: Something.\n") == {section: " Something.\n"}


@pytest.mark.parametrize("text", ["BP: 120/80", "LINES: two.", "Tubes: none", "see note: fine", "T3: INFECTIONS: x"])
def test_other_words_before_a_colon_are_no_headings(text: str) -> None:
    assert sections_of(text) == {}
    assert picked(text) == text


def test_an_export_without_line_breaks_is_read_by_its_capitals() -> None:
    text = "INDICATION: Cough. FINDINGS: Clear lungs; impression: none meant. IMPRESSION: Normal."
    assert picked(text) == "Clear lungs; impression: none meant. Normal."


def test_an_addendum_on_top_is_a_section_of_its_own_and_the_report_keeps_its_headings() -> None:
    text = f" ADDENDUM  The tube was moved.\n IMPRESSION: Wrong.\n{'_' * 78}\n{MIMIC}"
    assert picked(text) == picked(MIMIC)
    assert picked(text, "addendum") == "ADDENDUM The tube was moved. IMPRESSION: Wrong."


def test_a_line_of_underscores_separates_and_three_within_a_line_are_a_mark() -> None:
    assert picked("Seen by ___ today.\n______________\n") == "Seen by ___ today."
    assert picked("WET READ: ___ 10:01\n________\nFINDINGS: Clear.") == "Clear."


def test_a_report_without_findings_and_impression_gives_its_last_paragraph() -> None:
    text = "INDICATION: Cough.\n \n The lungs are clear.\n \n No effusion, as\n discussed.\n"
    assert picked(text) == "No effusion, as discussed."
    assert picked(text, "comparison") == ""


def test_a_text_without_headings_comes_whole() -> None:
    assert picked("Lungs clear.\n\nNo effusion.") == "Lungs clear. No effusion."


def test_sections_that_come_twice_are_joined_and_empty_ones_left_out() -> None:
    assert sections_of("FINDINGS: a\nIMPRESSION:\nFINDINGS: b") == {"findings": " a\n\n b"}


def test_sections_that_a_data_set_keeps_apart_are_taken_by_name() -> None:
    assert pick({"impression": "b", "findings": "a"}, ("findings", "impression")) == "a\nb"
    assert pick({"indication": "x"}, ("findings",)) == ""


@pytest.mark.parametrize("wanted", [(), ("finding",)])
def test_a_section_that_there_is_not_is_an_error(wanted: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="choose from findings, impression"):
        pick("text", wanted)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["A ", "IMPRESSION:", "_", "FINDINGS: \n", " \n", "IMPRESSOIN: ", "Á,("])
def test_a_text_that_repeats_itself_takes_no_long_time(unit: str) -> None:
    pick(unit * (65_536 // len(unit)), ("findings",))
