import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import MAX_BYTES, clean, decode, has_words

ANYTHING = st.text(st.characters(exclude_characters="\x00"))


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("  Heart size\n\tis   normal.\r\n", "Heart size is normal."),
        ("Lungs\u00a0clear.\u2028No effusion\x85.", "Lungs clear. No effusion ."),
        ("cafe\u0301", "caf\u00e9"),
        ("no\u200b ef\u00adfusion\ufeff", "no effusion"),
        ("safe\u202etxt.exe\u2066", "safetxt.exe"),
        ("\x1b[31mred\x1b[0m \x07bell\x9b", "red bell"),
        ("a \u200b b", "a b"),
        ("[red]<script>XXXX ___", "[red]<script>XXXX ___"),
        ("Cœur élargi, 5 µm, 30 °C", "Cœur élargi, 5 µm, 30 °C"),
        ("", ""),
    ],
)
def test_clean_leaves_one_line_of_what_can_be_seen(given_text, expected):
    assert clean(given_text) == expected


@given(ANYTHING)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


@given(ANYTHING)
def test_clean_text_is_short_normalised_and_free_of_control_characters(text):
    cleaned = clean(text)
    assert unicodedata.is_normalized("NFC", cleaned)
    assert cleaned == " ".join(cleaned.split())
    assert not [c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    cleaned.encode()


def test_visible_text_is_kept_as_it_is():
    text = "IMPRESSION: 1. Stable cardiomegaly; no pneumothorax (compared to 2019)."
    assert clean(text) == text


@pytest.mark.parametrize("letter", ["a", "é", "肺", "𝄞"])
def test_an_overlong_text_is_cut_between_characters(letter):
    cleaned = clean(letter * 2 * MAX_BYTES)
    assert MAX_BYTES - 4 < len(cleaned.encode()) <= MAX_BYTES
    assert set(cleaned) == {letter}


def test_nul_is_refused():
    with pytest.raises(RefusedError) as caught:
        clean("heart\x00lungs")
    assert caught.value.code == "text_nul"


def test_decode_takes_utf8_then_the_declared_encoding_and_never_guesses():
    assert decode(b"\xef\xbb\xbfHeart \xc3\xa9") == "Heart é"
    assert decode(b"Heart \xe9", fallback="cp1252") == "Heart é"
    for fallback in (None, "ascii"):
        with pytest.raises(RefusedError) as caught:
            decode(b"Heart \xe9", fallback=fallback)
        assert caught.value.code == "text_encoding"


def test_a_text_without_a_letter_or_digit_has_no_words():
    assert has_words("Normal.")
    assert has_words("肺")
    assert not has_words(" ___ . --")
