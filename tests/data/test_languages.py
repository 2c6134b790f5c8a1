import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmix.data.languages import language


@pytest.mark.parametrize(
    ("cell", "tag"),
    [("en", "en"), (" ES ", "es"), ("pt_br", "pt-BR"), ("zh-hant-tw", "zh-Hant-TW"), ("es-419", "es-419"), ("fil", "fil")],
)
def test_a_tag_is_written_in_the_usual_case(cell, tag):
    assert language(cell) == tag


@pytest.mark.parametrize("cell", ["", "English", "Hans Müller", "e", "en-", "en-1", "1970-01-02", "en-GB-oed", "en\nfr"])
def test_anything_else_says_nothing(cell):
    assert language(cell) == ""


@given(st.text(max_size=12) | st.from_regex(r"\A[A-Za-z]{2,3}([-_][A-Za-z]{4})?([-_][A-Za-z]{2})?\Z"))
def test_a_tag_stays_what_it_is(cell):
    assert language(language(cell)) == language(cell)
