import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmix.objectives.masking import WordIds, hide_patches, hide_words

# ---- patches


@pytest.mark.parametrize(
    ("num_patches", "ratio", "num_hidden"),
    [(16, 0.75, 12), (36, 0.7, 25), (36, 0.4, 14), (196, 0.75, 147), (4, 0.01, 1), (4, 0.99, 3), (2, 0.5, 1)],
)
def test_every_study_hides_exactly_the_asked_share_of_patches(num_patches: int, ratio: float, num_hidden: int) -> None:
    hidden = hide_patches(5, num_patches, ratio, tiny.generator()).hidden_BP
    assert hidden.sum(dim=1).tolist() == [num_hidden] * 5


@settings(max_examples=50, deadline=None)
@given(num_patches=st.integers(2, 60), ratio=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_visible_and_hidden_patches_are_two_parts_of_a_whole(num_patches: int, ratio: float, seed: int) -> None:
    visible, hidden = hide_patches(3, num_patches, ratio, tiny.generator(seed))
    for row in range(3):
        shown = set(visible[row].tolist())
        assert len(shown) == visible.shape[1] >= 1
        assert shown | set(hidden[row].nonzero().flatten().tolist()) == set(range(num_patches))
        assert int(hidden[row].sum()) == num_patches - len(shown) >= 1


def test_every_patch_is_hidden_equally_often() -> None:
    share = hide_patches(4000, 16, 0.75, tiny.generator()).hidden_BP.float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.03  # four standard deviations of a mean of 4000 draws


def test_studies_hide_different_patches() -> None:
    hidden = hide_patches(20, 16, 0.5, tiny.generator()).hidden_BP
    assert len({tuple(row) for row in hidden.tolist()}) > 15


def test_ratio_of_zero_shows_everything_and_draws_nothing() -> None:
    chance, words = tiny.generator(), tiny.words(3)
    before = chance.get_state()
    visible, hidden = hide_patches(3, 16, 0.0, chance)
    read, hidden_words = hide_words(words, 0.0, tiny.IDS, chance)
    assert visible.tolist() == [list(range(16))] * 3
    assert torch.equal(read, words)
    assert not hidden.any()
    assert not hidden_words.any()
    assert torch.equal(chance.get_state(), before)


# ---- words


def test_words_are_hidden_at_the_asked_rate() -> None:
    words = torch.full((500, 40), 7)
    hidden = hide_words(words, 0.25, tiny.IDS, tiny.generator()).hidden_BL
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.015)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 12), ratio=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_every_report_hides_at_least_one_word_and_never_a_special_id(length: int, ratio: float, seed: int) -> None:
    words = tiny.words(4, lengths=[length, 2, 3, 12])
    words[3, 5] = 1  # an unknown word says nothing, so it is no target
    found, hidden = hide_words(words, ratio, tiny.IDS, tiny.generator(seed))
    assert (hidden.sum(dim=1) >= 1).all()
    assert not (hidden & (words < tiny.FIRST_WORD)).any()
    assert (found[hidden] == tiny.MASK).all()
    assert torch.equal(found[~hidden], words[~hidden])


def test_special_ids_may_lie_anywhere_in_the_vocabulary() -> None:
    """A Hugging Face vocabulary has its mask at 103 and its words on both sides."""
    ids = WordIds(mask_id=9, special_ids=(0, 9, 30))
    words = torch.tensor([[30, 1, 2, 9, 0]])
    hidden = hide_words(words, 0.99, ids, tiny.generator()).hidden_BL
    assert hidden.tolist() == [[False, True, True, False, False]]


def test_report_without_a_word_hides_nothing() -> None:
    words = torch.tensor([[tiny.SUMMARY, 0, 0], [tiny.SUMMARY, 7, 0]])
    found, hidden = hide_words(words, 0.5, tiny.IDS, tiny.generator())
    assert hidden.tolist() == [[False, False, False], [False, True, False]]
    assert torch.equal(found[0], words[0])


def test_words_given_are_not_changed() -> None:
    words = tiny.words(4)
    before = words.clone()
    hide_words(words, 0.9, tiny.IDS, tiny.generator())
    assert torch.equal(words, before)


# ---- chance


def test_the_generator_decides_and_nothing_else_does() -> None:
    words = tiny.words(6)
    for hide in (
        lambda chance: hide_patches(6, 16, 0.5, chance).hidden_BP,
        lambda chance: hide_words(words, 0.5, tiny.IDS, chance).hidden_BL,
    ):
        torch.manual_seed(1)
        first = hide(tiny.generator(3))
        torch.manual_seed(2)
        assert torch.equal(hide(tiny.generator(3)), first)
        assert not torch.equal(hide(tiny.generator(4)), first)
