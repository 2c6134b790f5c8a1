"""A step in parts is the step: the same terms, and the same gradient as far as floats add up in another order."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch, Term
from fedmix.errors import ConfigError
from fedmix.federation.local import Assignment, arithmetic, train
from fedmix.federation.microbatch import Parts, descend
from fedmix.objectives.mixture import Learner

EVERYTHING: dict[str, Any] = {"mvm": 1.0, "mlm": 0.3, "contrast": 1.0, "match": 0.5, "joint_share": 0.5}
CHOICES: dict[str, Any] = EVERYTHING | {
    "anchor": 0.5,
    "soft_targets": 0.2,
    "same_patient": "left_out",
    "queue": 8,
    "joint_masking": "one_at_a_time",
    "match_negatives": "hard",
    "joint_share": 1.0,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked": {"mvm": 1.0, "mlm": 0.3},
    "everything": EVERYTHING,
    "choices": CHOICES,
    "sigmoid": CHOICES | {"soft_targets": 0.0, "queue": 0, "sizes": {"contrast_form": "sigmoid"}},
    "contrast": {"contrast": 1.0},
    "match": {"mlm": 0.3, "match": 1.0, "joint_share": 0.7},
}
CASES = pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("iiiii", "masked"),
        ("ttttt", "masked"),
        ("iii", "choices"),
        ("p", "choices"),
        ("ppppp", "contrast"),
        ("ppppp", "match"),
        ("iittppppp", "everything"),
        ("iittppppp", "choices"),
        ("iittppppp", "sigmoid"),
    ],
)
Gradients = dict[str, Tensor | None]


def gradients(learner: Learner) -> Gradients:
    return {name: parameter.grad for name, parameter in learner.model.named_parameters()}


def stepped(learner: Learner, kinds: str, parts: Parts) -> tuple[dict[str, Term], Gradients]:
    """Terms and gradient of a round's second step, which has a past, from a model that has moved since its first."""
    learner.model.skips_padding = True
    learner = learner.at_round_start()
    for seed in range(2):
        learner.model.zero_grad(set_to_none=True)
        batch = tiny.batch(kinds, seed, patients=[row // 2 for row in range(len(kinds))])
        terms = descend(learner, batch, tiny.generator(seed), parts=parts, within=nullcontext)
        if seed == 0:
            for parameter in learner.model.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=tiny.generator(parameter.numel()))
    return terms, gradients(learner)


def assert_alike(found: tuple[dict[str, Term], Gradients], expected: tuple[dict[str, Term], Gradients]) -> None:
    """The same terms and weights, the same parameters reached, and gradients within 1e-5 of the longest."""
    assert set(found[0]) == set(expected[0])
    for name, term in expected[0].items():
        torch.testing.assert_close(found[0][name].total, term.total, rtol=1e-5, atol=1e-5)
        assert found[0][name].weight == term.weight
    reached = {name for name, gradient in expected[1].items() if gradient is not None}
    assert {name for name, gradient in found[1].items() if gradient is not None} == reached
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values() if gradient is not None)
    for name in reached:
        torch.testing.assert_close(
            found[1][name], expected[1][name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- micro-batches


@CASES
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kinds: str, wanted: str, size: int) -> None:
    whole, cut = (stepped(tiny.learner(**OBJECTIVES[wanted]), kinds, Parts(one)) for one in (None, size))
    assert_alike(cut, whole)


def test_pieces_are_every_row_once_and_no_longer_than_asked_for() -> None:
    assert Parts(2).of(5) == [slice(0, 2, 1), slice(2, 4, 1), slice(4, 5, 1)]
    for num_rows in (1, 4, 7):
        for size in (None, 1, 3):
            pieces = [rows for rank in range(3) for rows in Parts(size, ranks=Beside(rank, 3)).of(num_rows)]
            rows = [row for piece in pieces for row in range(num_rows)[piece]]
            assert sorted(rows) == list(range(num_rows))
            assert all(len(range(num_rows)[piece]) <= (size or num_rows) for piece in pieces)


def test_a_batch_that_teaches_nothing_is_refused_in_parts_as_well() -> None:
    with pytest.raises(ConfigError, match="no objective of this stage applies"):
        descend(tiny.learner(mlm=1.0), tiny.batch("ii"), tiny.generator(), parts=Parts(1), within=nullcontext)


def test_a_round_in_micro_batches_is_the_round() -> None:
    """Six steps of AdamW on all objectives; losses and the change agree within a thousandth of its length."""
    plan = config.Stage(name="joint", rounds=1, local_steps=6, optimiser=config.Optimiser(kind="adamw"))
    found = [
        train(tiny.learner(**EVERYTHING), Fresh("itpppp"), Assignment("west", plan, 0, 0), parts=Parts(size))[0]
        for size in (None, 2)
    ]
    assert found[0].examples == found[1].examples
    assert set(found[0].deltas) == set(found[1].deltas)
    for name, (total, weight) in found[0].metrics.items():
        assert found[1].metrics[name] == (pytest.approx(total, rel=1e-3), weight)
    assert distance(found[0].deltas, found[1].deltas) < 1e-3


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 arithmetic")
def test_micro_batches_in_bfloat16_give_the_gradient_within_its_rounding() -> None:
    found = []
    for parts in (Parts(), Parts(2)):
        learner = tiny.learner(**EVERYTHING)
        descend(learner, tiny.batch("pppppp"), tiny.generator(), parts=parts, within=lambda: arithmetic("bfloat16"))
        found.append({name: gradient for name, gradient in gradients(learner).items() if gradient is not None})
    assert distance(found[0], found[1]) < 0.02


@dataclass(frozen=True)
class Fresh:
    """Another batch of the same streams at every step."""

    kinds: str

    def batch(self, step: int) -> Batch:
        return tiny.batch(self.kinds, seed=step)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference over the length of the first."""
    squares = [
        sum(float(value.square().sum()) for value in values) for values in ((one[n] - other[n] for n in one), one.values())
    ]
    return float((squares[0] / squares[1]) ** 0.5)


# ---- activations


class Saved:
    """Counts the bytes that the backward pass waits for, and the most there were at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Held:
        return Held(self, tensor)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)


class Held:
    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        saved.now += tensor.numel() * tensor.element_size()
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.tensor.numel() * self.tensor.element_size()


def most_saved(parts: Parts, *, kinds: str, depth: int = 6) -> int:
    learner, saved = tiny.learner(**EVERYTHING, sizes={"depth": depth}), Saved()
    plan = config.Stage(name="joint", rounds=1, local_steps=1)
    with saved.hooks():
        train(learner, Fresh(kinds), Assignment("west", plan, 0, 0), parts=parts)
    return saved.most


@pytest.mark.parametrize("kinds", ["i" * 12, "t" * 12, "p" * 12])
def test_micro_batches_and_computing_anew_save_less_for_the_backward_pass(kinds: str) -> None:
    """Parameters are saved as well as activations, whatever the number of studies; the rest falls as it should."""
    whole, one = most_saved(Parts(), kinds=kinds), most_saved(Parts(1), kinds=kinds)
    assert one < 0.5 * whole
    assert most_saved(Parts(3), kinds=kinds) < whole - 0.5 * (whole - one)
    assert most_saved(Parts(keeps_activations=False), kinds=kinds) < 0.5 * whole


PRECISIONS = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 arithmetic here"),
    ),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wanted", ["everything", "choices"])
def test_activations_computed_anew_give_the_same_bits(wanted: str, precision: str) -> None:
    plan = config.Stage(name="joint", rounds=1, local_steps=3)
    found = [
        train(
            tiny.learner(**OBJECTIVES[wanted]),
            Fresh("itppppp"),
            Assignment("west", plan, 0, 0),
            precision=precision,
            parts=Parts(keeps_activations=keeps),
        )[0]
        for keeps in (True, False)
    ]
    assert found[0].metrics == found[1].metrics
    assert all(torch.equal(delta, found[1].deltas[name]) for name, delta in found[0].deltas.items())


# ---- several ranks


@dataclass(frozen=True)
class Beside:
    """Ranks that are threads of this process: each brings its numbers to a table, and takes the sum in the same order."""

    number: int
    total: int
    table: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    gate: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def add(self, tensors: Sequence[Tensor]) -> None:
        self.table[self.number] = [tensor.detach().clone() for tensor in tensors]
        self.gate.wait(timeout=60)
        for place, tensor in enumerate(tensors):
            tensor.detach().copy_(torch.stack([self.table[rank][place] for rank in range(self.total)]).sum(dim=0))
        self.gate.wait(timeout=60)


def side_by_side(total: int, job: Callable[[Beside], Any]) -> list[Any]:
    """What each of some ranks returns."""
    table: dict[int, Sequence[Tensor]] = {}
    gate, found = threading.Barrier(total), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            found[rank] = job(Beside(rank, total, table, gate))
        except BaseException:
            gate.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(total)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(total)]


@CASES
@pytest.mark.parametrize(("total", "size"), [(2, None), (3, 1)])
def test_ranks_give_the_gradient_of_the_whole_batch(kinds: str, wanted: str, total: int, size: int | None) -> None:
    """All of them alike, to the bit, and where a rank has no study of a kind, too."""
    whole, *learners = [tiny.learner(**OBJECTIVES[wanted]) for _ in range(1 + total)]
    found = side_by_side(total, lambda ranks: stepped(learners[ranks.number], kinds, Parts(size, ranks=ranks)))
    assert_alike(found[0], stepped(whole, kinds, Parts()))
    for terms, parameters in found[1:]:
        assert {name: float(term.total) for name, term in terms.items()} == {
            name: float(term.total) for name, term in found[0][0].items()
        }
        for name, gradient in parameters.items():
            first = found[0][1][name]
            assert gradient is first is None or torch.equal(gradient, first), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_ranks_leave_what_no_loss_reached_as_it_was(kind: str) -> None:
    """Moments from pairs must not move the text side in a round of images, as zeroed gradients would let them."""
    paired = config.Stage(name="joint", rounds=1, local_steps=2, optimiser=config.Optimiser(kind=kind, weight_decay=0.5))
    start = tiny.learner(**EVERYTHING)
    _, moments = train(start, Fresh("pppp"), Assignment("west", paired, 0, 0))
    before = tiny.parameters_of(start.model)
    learners = [start, copy.deepcopy(start)]

    def images(ranks: Beside) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        update, _ = train(
            learners[ranks.number],
            Fresh("iii"),
            Assignment("west", paired, 0, 0),
            optimiser_state=moments,
            parts=Parts(ranks=ranks),
        )
        return dict(update.deltas), tiny.parameters_of(learners[ranks.number].model)

    deltas, after = side_by_side(2, images)[0]
    assert "embed_image.project.weight" in deltas
    assert "embed_text.word.weight" not in deltas
    assert all(name in deltas or torch.equal(value, before[name]) for name, value in after.items())
