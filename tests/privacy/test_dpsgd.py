"""The mechanism by itself: who is drawn, how far a gradient may reach, and the same as Opacus where Opacus applies."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn

from fedmix.errors import ConfigError
from fedmix.privacy import dpsgd
from fedmix.privacy.dpsgd import ClippedSum, clip_factors, learning_modules, noised, poisson_sample, secret_chance

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def test_patients_are_drawn_each_on_their_own_with_the_stated_chance() -> None:
    chance, num_patients, rate, num_draws = tiny.generator(), 40, 0.3, 3000
    drawn = torch.zeros(num_draws, num_patients, dtype=torch.float64)
    for row in drawn:
        row[poisson_sample(num_patients, rate, chance)] = 1.0
    spread = (rate * (1 - rate) / num_draws) ** 0.5
    assert bool(((drawn.mean(dim=0) - rate).abs() < 5 * spread).all())
    sizes = drawn.sum(dim=1)  # binomial: a fixed batch size would have no variance
    assert float(sizes.var()) == pytest.approx(num_patients * rate * (1 - rate), rel=0.15)
    together = drawn.T @ drawn / num_draws
    off = together[~torch.eye(num_patients, dtype=torch.bool)]
    assert bool(((off - rate**2).abs() < 6 * (rate**2 / num_draws) ** 0.5).all())


def test_sure_and_impossible_draws() -> None:
    assert poisson_sample(7, 1.0, tiny.generator()).tolist() == list(range(7))
    assert poisson_sample(7, 0.0, tiny.generator()).tolist() == []


@given(st.lists(st.floats(0, 1e30) | st.sampled_from([float("inf"), float("nan")]), min_size=1), st.floats(1e-3, 1e3))
def test_factors_never_lengthen_and_never_leave_more_than_the_clip(norms: list[float], clip: float) -> None:
    norm_U = torch.tensor(norms, dtype=torch.float64)
    factor_U = clip_factors(norm_U, clip)
    assert bool(((factor_U >= 0) & (factor_U <= 1)).all())
    known = norm_U.isfinite()
    assert bool((factor_U[known] * norm_U[known] <= clip * (1 + 1e-12)).all())
    assert bool((factor_U[known & (norm_U <= clip)] >= 1 - 1e-12).all())
    assert bool((factor_U[~known] == 0).all())


def test_nobody_knows_the_seed() -> None:
    assert len({secret_chance().initial_seed() for _ in range(8)}) == 8


def test_noise_is_added_before_the_division_by_who_was_expected() -> None:
    total = torch.full((1000,), 12.0)
    found = noised(total, noise_multiplier=2.0, clip=0.5, expected=4, chance=tiny.generator())
    assert float(found.mean()) == pytest.approx(3.0, abs=5 * 0.25 / 1000**0.5)
    assert float(found.std()) == pytest.approx(0.25, rel=0.1)


def test_clipped_sums_equal_those_of_opacus_where_a_row_is_a_patient() -> None:
    """Opacus' own per-sample gradients, one study a patient and one call a module: its trap does not bite there."""
    patients, clip = 4, 0.02

    def losses(net: nn.Module) -> Tensor:
        visible = tiny.places(patients, tiny.VISIBLE)
        encoded = net.encode(image_BSS=tiny.images(patients), visible_BK=visible)
        return net.decode_patches(encoded, visible).square().mean(dim=(1, 2))

    watched = GradSampleModule(tiny.model(), loss_reduction="sum")
    losses(watched._module).sum().backward()
    theirs = {name: p.grad_sample for name, p in watched._module.named_parameters() if p.grad_sample is not None}
    norm_U = torch.stack([sample.flatten(1).norm(dim=1) for sample in theirs.values()]).norm(dim=0)
    assert int((norm_U > clip).sum()) > 0
    factor_U = (clip / norm_U).clamp(max=1.0)

    net = tiny.model()
    ours = ClippedSum(learning_modules(net, lambda name: True), clip)
    with ours.watching(), ours.rows_of(torch.arange(patients)):
        loss = losses(net).sum()
    loss.backward()
    torch.testing.assert_close(ours.add(patients).float(), norm_U, rtol=1e-4, atol=1e-8)
    assert set(ours.totals) == set(theirs)
    for name, sample in theirs.items():
        expected = torch.einsum("u,u...->...", factor_U, sample)
        torch.testing.assert_close(ours.totals[name], expected, rtol=1e-3, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_opacus_by_itself_adds_rows_of_different_patients_up() -> None:
    """Why rows are told their patient: a module called twice has row i of both calls summed, whoever they are."""
    module = nn.Linear(2, 1, bias=False)
    first, second = torch.eye(2), torch.eye(2).flip(0)  # the second call has the patients the other way round
    watched = GradSampleModule(module, loss_reduction="sum")
    (watched(first).sum() + watched(second).sum()).backward()
    assert module.weight.grad_sample.flatten(1).tolist() == [[1.0, 1.0], [1.0, 1.0]]  # of patient 0: [2, 0]

    fresh = nn.Sequential(nn.Linear(2, 1, bias=False))
    ours = ClippedSum(learning_modules(fresh, lambda name: True), clip=1e9)
    with ours.watching():
        with ours.rows_of(torch.tensor([0, 1])):
            loss = fresh(first).sum()
        with ours.rows_of(torch.tensor([1, 0])):
            loss = loss + fresh(second).sum()
    loss.backward()
    assert ours.add(2).tolist() == [2.0, 2.0]


def test_a_module_without_a_known_gradient_is_refused() -> None:
    with pytest.raises(ConfigError, match="no per-patient gradient is known for a Conv2d"):
        learning_modules(nn.Sequential(nn.Conv2d(1, 1, 3)), lambda name: True)


@pytest.mark.parametrize("num_tokens", [3, 64])  # norms by tokens, and by entries
@pytest.mark.parametrize("splits", [False, True])
def test_bfloat16_gradients_equal_a_loop_over_patients_to_float32(
    num_tokens: int, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autocast multiplies is known exactly here, so a sum that were rounded to bfloat16 would differ by 1e-3."""
    if splits:  # else as this processor needs
        monkeypatch.setattr(dpsgd, "_does_round", lambda: True)
    patient_N, module = torch.tensor([0, 1, 1, 2, 3]), nn.Linear(48, 80)
    read, gradient = (torch.randn(5, num_tokens, width, generator=tiny.generator(width)).bfloat16() for width in (48, 80))
    gradient[4] = float("inf")
    ours, before = ClippedSum({"linear": module}, clip=20.0), torch.backends.mkldnn.matmul.fp32_precision
    with ours.watching(), ours.rows_of(patient_N), torch.autocast("cpu", torch.bfloat16):
        module(read.float()).backward(gradient)
    norm_U = ours.add(4)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    expected = {"linear.weight": torch.zeros(80, 48).double(), "linear.bias": torch.zeros(80).double()}
    for patient in range(3):
        own = gradient[patient_N == patient].double().flatten(0, 1)
        each = [own.mT @ read[patient_N == patient].double().flatten(0, 1), own.sum(dim=0)]
        norm = float(torch.cat([one.flatten() for one in each]).norm())
        assert norm * (1 - 1e-6) <= float(norm_U[patient]) <= norm * (1 + 1e-4)  # what rounding may hide is added
        for total, one in zip(expected.values(), each, strict=True):
            total += min(1.0, 20.0 / float(norm_U[patient])) * one
    assert not bool(norm_U[3].isfinite())
    for name, total in expected.items():
        torch.testing.assert_close(ours.totals[name].double(), total, rtol=1e-5, atol=1e-5)


def test_float32_numbers_are_exact_sums_of_three_that_survive_rounding() -> None:
    values = torch.randn(10_000, generator=tiny.generator()) * 2.0 ** torch.randint(
        -40, 40, (10_000,), generator=tiny.generator()
    )
    terms = dpsgd._terms(values, is_rounded=True)
    assert all(torch.equal(term, term.bfloat16().float()) for term in terms)
    assert torch.equal(torch.stack(terms).double().sum(dim=0), values.double())
    assert [len(one) for one in dpsgd._terms(values, is_rounded=False)] == [len(values)]


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_tokens_whose_gradients_cancel_are_clipped_by_their_true_length(scale: float) -> None:
    """The squared length is then a small difference of large numbers, which float32 alone may call zero."""
    tokens, width, clip = 8, 24, 1.0
    chance = tiny.generator()
    read = torch.randn(3, tokens, width, generator=chance)
    gradient = torch.randn(3, tokens, width, generator=chance) * scale
    read[:, 1::2] = read[:, ::2] * (1 + 1e-5)  # nearly the same token with nearly the opposite gradient
    gradient[:, 1::2] = -gradient[:, ::2]
    linear = nn.Linear(width, width, bias=False)
    ours = ClippedSum({"linear": linear}, clip)
    for one, back in zip(read, gradient, strict=True):
        with ours.watching(), ours.rows_of(torch.tensor([0])):
            linear(one[None]).backward(back[None])
        ours.totals.clear()
        norm_U = ours.add(1)
        true = back.double().T @ one.double()
        assert float(norm_U) >= float(true.norm()) * (1 - 1e-6)
        assert float(ours.totals["linear.weight"].double().norm()) <= clip * 1.01
