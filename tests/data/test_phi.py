import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmix.data import phi
from fedmix.data.quarantine import REASONS

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # as East Asian keyboards write Latin digits
FOUND = {
    "phi_date": [
        "Compared to 12/03/2019.",
        "seen 3-12-19",
        "2019-03-12",
        "20190312",
        "12.03.2019",
        "on March 12",
        "March 12th, 2019",
        "12 March 2019",
        "12th of March",
        "in March 2019",
        "Sept. 2019",
        "May 5",
        "5 May",
        "may 5, 2019",
        "radiografía del 12 de marzo de 2019",
        "marzo 2019",
        "estudio del 12/3",
        "vom 3. Oktober",
        "le 14 juillet",
        "on 3/12",
        "12/03/2019".translate(FULL_WIDTH),
        "12/03/2019, then ___",
    ],
    "phi_phone": [
        "call (555) 123-4567",
        "555-123-4567",
        "555 123 4567",
        "+44 20 7946 0958",
        "tel. 96 386 10 00",
        "963 861 000",
        "612345678",
        "pager 12345",
        "ext. 4411",
        "x4411",
        "busca: 3344",
    ],
    "phi_email": ["jane.doe@example.org", "JANE@EXAMPLE.ORG", "see https://example.org/x", "www.example.org"],
    "phi_record": [
        "MRN: 123456",
        "MRN 00-1234",
        "Medical record number 445566",
        "accession no. AB-123456",
        "Acc# 7788",
        "NHC 123456",
        "historia clínica: 88123",
        "DNI 12345678Z",
        "X1234567L",
        "078-05-1120",
        "NHS number 943 476",
        "number 123456789012",
        "1.2.840.113619.2.55.3.604688",
    ],
    "phi_name": [
        "discussed with Dr. Smith",
        "Dr Smith",
        "DR. SMITH",
        "dr. garcia",
        "dr. Smith",
        "Dr. J. Smith",
        "Drs. Ng and Ito",
        "Dra. Núñez",
        "Mr. O'Brien",
        "Mrs Jones",
        "Ms. Lee",
        "Sra. Pérez",
        "sr lopez",
        "Herr Müller",
        "Frau Weiß",
        "Mme Dupont",
        "Doña Inés",
        "Professor Wu",
        "Electronically signed by: Jane Doe",
        "Dictated by Jane",
        "Patient: Doe",
        "NAME: DOE",
        "Nombre: Inés",
    ],
}
CLEAN = [
    "The lungs are clear. No effusion or pneumothorax.",
    "Seen by Dr. ___ on ___ at 10:45, MRN ___, tel ___.",
    "Dr. XXXX was told. XXXX XXXX.",
    "[**Name 12/03/2019**] was [**2019-3-12**]",
    "A 72-year-old woman, 65 years; mujer de 71 años.",
    "Unchanged since 2019. Stenting in 2011.",
    "Nodule of 3.2 x 4.5 x 12 mm, 1.2 cm; 120/80 mmHg; 1/2 of the lung; T3/T4; L1-2.",
    "Level 3 may represent a nodule. It may be old. March through 4 views.",
    "MR imaging, DR image and CT; MS of long standing; Dr of note.",
    "Rib 10, 11 and 12; 5-6 days; 2-3 cm; series 3, image 45.",
    "Vitamin D. Lungs clear. Sternal wires x 6; 1024x1024 pixels.",
    "Tip 3.5 cm above the carina at 14:30.",
    "PICC line, tube 2.0.",
    "sin hallazgos patologicos valorables. señales de la derecha",
    "SpO2 98 % at 2 l/min; 37.5 °C; 1.000.000",
    "Patient rotated. Name of the vein: azygos.",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_what_names_a_person_or_a_day_is_found(kind: str, text: str) -> None:
    assert kind in phi.kinds(text)
    assert kind in phi.kinds(f"The lungs are clear. {text} No effusion.")


@pytest.mark.parametrize("text", CLEAN)
def test_marks_ages_years_and_measures_are_no_finding(text: str) -> None:
    assert phi.kinds(text) == ()


def test_kinds_are_reason_codes_and_come_in_one_order() -> None:
    assert set(phi.KINDS) <= set(REASONS)
    assert phi.kinds("Dr. Smith, MRN 1234567, a@b.org, 555-123-4567, 12/03/2019") == phi.KINDS


@given(st.text())
def test_only_kinds_come_back_whatever_the_text(text: str) -> None:
    assert set(phi.kinds(text)) <= set(phi.KINDS)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["1", "1-", "1.", "a@", "a.", "+1 ", "Dr. ", "mrn #", "12/", "[**", "_", "x1234", "1 ", "a-"])
def test_a_text_that_repeats_itself_takes_no_long_time(unit: str) -> None:
    phi.kinds(unit * (65_536 // len(unit)))


def test_a_date_is_found_wherever_it_stands_in_a_long_text() -> None:
    words = ["lungs", "clear", "no", "effusion", "4", "cm", "___", "XXXX."] * 500
    chance = random.Random(0)
    for _ in range(20):
        place = chance.randrange(len(words))
        assert phi.kinds(" ".join([*words[:place], "12/03/2019", *words[place:]])) == ("phi_date",)
