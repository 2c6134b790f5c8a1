import pytest
import tiny
import torch

from fedmix.batch import STREAMS, Batch, Study, Term
from fedmix.errors import DataError

HAS, LACKS = True, False


def mask(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


# ---- terms


def test_terms_are_added_as_sums_and_weights_and_divided_once() -> None:
    """Two images at error 1 and eight at error 2: the mean of the means would say 1.5."""
    added = Term(torch.tensor(2.0), torch.tensor(2.0)) + Term(torch.tensor(16.0), torch.tensor(8.0))
    assert added.mean() == pytest.approx(1.8)


def test_term_of_weight_zero_is_zero_with_zero_gradient() -> None:
    value = torch.tensor([3.0, 4.0], requires_grad=True)
    nothing = torch.zeros(2)
    mean = Term((value * nothing).sum(), nothing.sum()).mean()
    mean.backward()
    assert mean == 0
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 0.0]


def test_mean_equals_total_over_weight_to_the_bit() -> None:
    term = Term(torch.tensor(1.0), torch.tensor(3.0))
    assert torch.equal(term.mean(), torch.tensor(1.0) / 3)


def test_something_that_is_no_term_cannot_be_added() -> None:
    with pytest.raises(TypeError):
        Term(torch.tensor(1.0), torch.tensor(1.0)) + (1.0, 2.0)  # noqa: RUF005 (a tuple must not be appended)


# ---- studies


def test_stream_of_a_study_is_what_it_has() -> None:
    image, text = torch.zeros(4, 4, dtype=torch.uint8), torch.tensor([2, 7])
    assert Study(image, None).stream == "image"
    assert Study(None, text).stream == "text"
    assert Study(image, text).stream == "paired"


def test_study_with_neither_image_nor_report_is_refused() -> None:
    with pytest.raises(DataError, match="neither an image nor a report; leave it out"):
        _ = Study(None, None).stream


# ---- batches


@pytest.mark.parametrize(
    ("num_images", "num_texts", "message"),
    [(1, 1, "1 images and 1 texts, its masks say 2 and 1"), (2, 2, "2 images and 2 texts, its masks say 2 and 1")],
)
def test_rows_and_masks_must_agree(num_images: int, num_texts: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batch(tiny.images(num_images), tiny.words(num_texts), mask(HAS, HAS, LACKS), mask(LACKS, LACKS, HAS))


def test_masks_that_speak_of_an_absent_modality_are_refused() -> None:
    with pytest.raises(DataError, match="0 images and 1 texts, its masks say 1 and 1"):
        Batch(None, tiny.words(1), mask(HAS), mask(HAS))


def test_batch_with_an_empty_study_is_refused() -> None:
    with pytest.raises(DataError, match="neither an image nor a report"):
        Batch(tiny.images(1), None, mask(HAS, LACKS), mask(LACKS, LACKS))


def test_patient_numbers_are_one_a_study() -> None:
    with pytest.raises(DataError, match="2 studies and 1 patient numbers; give one a study"):
        Batch(tiny.images(2), None, mask(HAS, HAS), mask(LACKS, LACKS), torch.tensor([4]))


def test_absent_modality_is_absent() -> None:
    assert tiny.batch("ii").text is None
    assert tiny.batch("tt").image is None


@pytest.mark.parametrize("kinds", ["i", "t", "p", "itp", "ppti", "tiptip"])
def test_counts_are_those_of_the_studies(kinds: str) -> None:
    batch = tiny.batch(kinds)
    letters = {"image": "i", "text": "t", "paired": "p"}
    assert batch.counts() == {stream: kinds.count(letters[stream]) for stream in STREAMS}
    assert len(batch) == len(kinds)
