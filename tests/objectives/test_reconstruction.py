import pytest
import tiny
import torch
import torch.nn.functional as F

from fedmix.model import pyramid
from fedmix.objectives.reconstruction import masked_patch_term, masked_word_term

KINDS = ("multi_scale", "single_scale", "norm_pix")


def case(kind: str, patch_size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions, patches and what is hidden, of 3 studies with 5 patches."""
    chance = tiny.generator(2)
    predicted = torch.randn(3, 5, pyramid.num_values(kind, patch_size), generator=chance)
    patches = torch.rand(3, 5, patch_size * patch_size, generator=chance)
    return predicted, patches, torch.rand(3, 5, generator=chance) < 0.5


def test_masked_patch_term_by_hand() -> None:
    """Targets (x - .5) / .2 are 0 1 -1 0 in the hidden patch, so predicting 0 errs by (0 + 1 + 1 + 0) / 4."""
    patches = torch.tensor([[[0.5, 0.7, 0.3, 0.5], [0.9, 0.9, 0.9, 0.9]]])
    term = masked_patch_term(torch.zeros(1, 2, 4), patches, torch.tensor([[True, False]]), kind="single_scale")
    assert term.total.item() == pytest.approx(0.5)
    assert term.weight.item() == 1


def test_pyramid_term_by_hand() -> None:
    """A hidden patch of grey .7 is (.7 - .5) / .2 = 1 at the coarse scale and 0 at the finer ones: error 1 + 0 + 0."""
    patches = torch.full((1, 1, 16), 0.7)
    term = masked_patch_term(torch.zeros(1, 1, 21), patches, torch.tensor([[True]]), kind="multi_scale")
    assert term.total.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_patch_term_equals_a_loop_over_hidden_patches(kind: str) -> None:
    predicted, patches, hidden = case(kind)
    target, sizes = pyramid.split(kind, patches), pyramid.level_sizes(8) if kind == "multi_scale" else [64]
    total, count = 0.0, 0
    for study, place in hidden.nonzero().tolist():
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            total += (predicted[study, place, part] - target[study, place, part]).square().sum().item() / size
            start += size
        count += 1
    term = masked_patch_term(predicted, patches, hidden, kind=kind)
    assert term.total.item() == pytest.approx(total, rel=1e-5)
    assert term.weight.item() == count


@pytest.mark.parametrize("kind", KINDS)
def test_masked_patch_term_ignores_visible_patches(kind: str) -> None:
    predicted, patches, hidden = case(kind)
    predicted.requires_grad_()
    before = masked_patch_term(predicted, patches, hidden, kind=kind)
    changed = torch.where(hidden.unsqueeze(-1), patches, torch.rand(patches.shape))
    assert torch.equal(masked_patch_term(predicted, changed, hidden, kind=kind).total, before.total)
    before.total.backward()
    assert predicted.grad is not None
    assert (predicted.grad[~hidden] == 0).all()
    assert (predicted.grad[hidden] != 0).any(dim=-1).all()


def test_norm_pix_term_equals_the_loss_of_mae() -> None:
    """As in MAE's forward_loss, with its mean over removed patches."""
    predicted, patches, hidden = case("norm_pix")
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    loss = ((predicted - (patches - mean) / (variance + 1e-6) ** 0.5) ** 2).mean(dim=-1)
    expected = (loss * hidden).sum() / hidden.sum()
    torch.testing.assert_close(masked_patch_term(predicted, patches, hidden, kind="norm_pix").mean(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_true_values_have_no_error(kind: str) -> None:
    _, patches, hidden = case(kind)
    assert masked_patch_term(pyramid.split(kind, patches), patches, hidden, kind=kind).total == 0


def test_nothing_hidden_is_zero_with_zero_gradient() -> None:
    predicted, patches, _ = case("multi_scale")
    predicted.requires_grad_()
    mean = masked_patch_term(predicted, patches, torch.zeros(3, 5, dtype=torch.bool), kind="multi_scale").mean()
    mean.backward()
    assert mean == 0
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()


def test_masked_word_term_equals_cross_entropy() -> None:
    logits, words = torch.randn(7, 50), torch.randint(0, 50, (7,))
    term = masked_word_term(logits, words)
    torch.testing.assert_close(term.mean(), F.cross_entropy(logits, words))
    assert term.weight.item() == 7


def test_masked_word_term_by_hand() -> None:
    """Probabilities 1/4 and 3/4 for the true words: ln 4 + ln 4/3."""
    logits = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    assert masked_word_term(logits, torch.tensor([0, 1])).total.item() == pytest.approx(1.386294 + 0.287682, abs=1e-5)


def test_zero_hidden_words_are_zero_with_zero_gradient() -> None:
    logits = torch.zeros(0, 50, requires_grad=True)
    term = masked_word_term(logits, torch.zeros(0, dtype=torch.int64))
    term.mean().backward()
    assert (term.mean().item(), term.weight.item()) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_whatever_the_model_runs_in(dtype: torch.dtype) -> None:
    predicted, patches, hidden = case("multi_scale")
    assert masked_patch_term(predicted.to(dtype), patches, hidden, kind="multi_scale").total.dtype == torch.float32
    assert masked_word_term(torch.randn(3, 5).to(dtype), torch.tensor([0, 1, 2])).total.dtype == torch.float32
