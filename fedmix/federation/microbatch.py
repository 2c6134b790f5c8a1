"""A step's gradient piece by piece: micro-batches one after the other, and shares of several processes side by side.

The pieces give the gradient of the WHOLE batch, for every objective:

- What is hidden is drawn for the whole batch, by the same draws, and then cut.
- A masked loss is a sum over studies divided by what the whole batch hides, which is known before anything is computed.
- Contrast compares all pairs of the batch, as GradCache does (2101.06983): all are embedded without keeping activations,
  the loss is taken on the embeddings, and each piece is read again to take its embeddings' gradient further. Hard negatives,
  soft targets and the queue are those of the whole batch too.

Equal means up to the order in which floats are added, not to the bit: on the tests' model 1e-6 of the gradient's length in
float32, and 3e-3 in bfloat16, where every piece rounds the gradients of its matrices. A draw of a hard negative can fall
differently where two reports are that near. GradCache costs a second forward pass of the pairs, except where a rank's share
is one piece; and every rank reads the whole batch from the shard, of which it computes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch, Term, placed
from fedmix.federation.ranks import Alone, Ranks, add_gradients
from fedmix.model.encoder import Encoded
from fedmix.objectives.mixture import Learner, added
from fedmix.objectives.readings import Pairs, Plan, Reading

Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Parts:
    """How a step is cut: ``micro_batch`` sequences at a time (None: all at once) in each of some ranks.

    ``keeps_activations``: False computes blocks anew in the backward pass (``layers.keep_activations``).
    """

    micro_batch: int | None = None
    keeps_activations: bool = True
    ranks: Ranks = field(default_factory=Alone)

    @property
    def are_one(self) -> bool:
        """Whether a step is computed whole, in this process."""
        return self.micro_batch is None and self.ranks.total == 1

    def of(self, num_rows: int) -> list[slice]:
        """This rank's rows in pieces. Rows are dealt like cards, for what costs more may stand together."""
        own = range(num_rows)[self.ranks.number :: self.ranks.total]
        size = self.micro_batch or max(1, len(own))
        pieces = [own[start : start + size] for start in range(0, len(own), size)]
        return [slice(piece.start, piece.stop, piece.step) for piece in pieces]


def parts_of(settings: config.Federation, ranks: Ranks | None = None) -> Parts:
    """How an experiment cuts its steps, on one of some ranks."""
    return Parts(settings.micro_batch, keeps_activations=not settings.checkpoint_activations, ranks=ranks or Alone())


def descend(learner: Learner, batch: Batch, generator: Generator, *, parts: Parts, within: Within) -> dict[str, Term]:
    """Leave the gradient of the batch's loss in the model and return the batch's terms; on every rank the same.

    ``within``: the arithmetic that forward passes are computed in, entered anew for each: under autocast it forgets its
    casts when it is left, and one that was made where no gradient is kept would pass none on.
    """
    if not parts.are_one:
        return _Step(learner, parts, within).run(batch, generator)
    with within():
        terms = learner.terms(batch, generator)
        loss = learner.loss(terms)
    loss.backward()
    return terms


class _Step:
    """One step in parts. A reading goes by its number: those of the plan, then the joint ones."""

    def __init__(self, learner: Learner, parts: Parts, within: Within) -> None:
        self._learner, self._parts, self._within = learner, parts, within
        self._weights: dict[str, Tensor] = {}  # what the terms of the whole batch count
        self._totals: dict[str, Tensor] = {}  # what this rank has found of them
        self._kept: dict[int, Encoded] = {}  # readings of pairs with their activations

    def run(self, batch: Batch, generator: Generator) -> dict[str, Term]:
        """Descend every reading, then add what the ranks found."""
        plan = self._learner.plan(batch, generator)
        pulls: dict[int, Tensor] = {}
        readings = list(plan.readings)
        if plan.pairs is not None:
            wrong_B = None
            if self._learner.objectives.contrast:
                pulls, wrong_B = self._contrast(plan, plan.pairs, generator)
            readings += self._learner.join(plan.pairs, wrong_B, generator)
        self._expect(readings)
        for number, reading in enumerate(readings):
            for rows in self._parts.of(len(reading)):
                self._descend(number, reading.part(rows), pulls[number][rows] if number in pulls else None)
        add_gradients(self._learner.model, self._parts.ranks, list(self._totals.values()))
        return {name: Term(total, self._weights[name]) for name, total in self._totals.items()}

    def _contrast(self, plan: Plan, pairs: Pairs, generator: Generator) -> tuple[dict[int, Tensor], Tensor | None]:
        """Contrast's gradient [B, E] at both sides' embeddings, by reading, and the wrong reports that it finds hard."""
        numbers = (len(plan.readings) - 2, len(plan.readings) - 1)
        image_BE, text_BE = (self._embedded(number, plan.readings[number]).requires_grad_() for number in numbers)
        alike_BE = None
        if self._learner.objectives.soft_targets:
            alike_BE = self._gathered(len(pairs.words_BL), lambda rows: self._learner.likeness(pairs.words_BL[rows]))
        with self._within():
            term, wrong_B = self._learner.compare(image_BE, text_BE, pairs, alike_BE, generator)
            loss = self._learner.loss({"contrast": term})
        loss.backward()
        self._weights["contrast"] = term.weight
        if self._parts.ranks.number == 0:
            self._totals["contrast"] = term.total.detach()
        else:  # every rank has computed it, and the temperature's gradient counts once
            self._learner.model.zero_grad(set_to_none=True)
        assert image_BE.grad is not None
        assert text_BE.grad is not None
        return dict(zip(numbers, (image_BE.grad, text_BE.grad), strict=True)), wrong_B

    def _embedded(self, number: int, reading: Reading) -> Tensor:
        """Embeddings [B, E] of a whole reading of the pairs, for a loss on them alone."""
        pieces = self._parts.of(len(reading))
        if len(pieces) == 1:  # as much as may be kept at a time, so it need not be read again
            with self._within():
                self._kept[number] = self._learner.encode(reading.part(pieces[0]))

        def embed(rows: slice) -> Tensor:
            part = reading.part(rows)
            return self._learner.embedding(part, self._kept.get(number) or self._learner.encode(part))

        return self._gathered(len(reading), embed)

    def _gathered(self, num_rows: int, embed: Callable[[slice], Tensor]) -> Tensor:
        """Embeddings [B, E] piece by piece and from all ranks, without a gradient."""
        projection = self._learner.model.projection.image
        whole_BE = projection.weight.new_zeros(num_rows, projection.out_features)
        for rows in self._parts.of(num_rows):
            with torch.no_grad(), self._within():
                whole_BE[rows] = embed(rows).detach()
        self._parts.ranks.add([whole_BE])  # zeros but for one rank's in every row
        return whole_BE

    def _expect(self, readings: Iterable[Reading]) -> None:
        """Take down what the terms of the whole batch will have counted, and start their totals."""
        for reading in readings:
            for name, counted in reading.weights().items():
                weight = placed(counted, self._learner.model.device)
                self._weights[name] = self._weights[name] + weight if name in self._weights else weight
        if not self._weights:
            self._learner.loss({})  # says that this batch teaches nothing, and what to do
        self._totals = {name: self._totals.get(name, torch.zeros_like(weight)) for name, weight in self._weights.items()}

    def _descend(self, number: int, part: Reading, pull_NE: Tensor | None) -> None:
        """Add the gradient of some rows of a reading; ``pull_NE`` is contrast's at their embeddings."""
        if not part.weights() and pull_NE is None:
            return
        losses = []
        with self._within():
            encoded = self._kept.pop(number, None) or self._learner.encode(part)
            terms = added(self._learner.ask(part, encoded))
            if terms:
                losses.append(self._learner.loss({name: Term(term.total, self._weights[name]) for name, term in terms.items()}))
            if pull_NE is not None:
                losses.append((self._learner.embedding(part, encoded) * pull_NE).sum())
        torch.stack(losses).sum().backward()
        for name, term in terms.items():
            self._totals[name] = self._totals[name] + term.total.detach()
