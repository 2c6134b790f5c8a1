"""Which terms a batch allows: images alone, reports alone, pairs apart and pairs as one sequence.

A pair is read three ways. Image and report each alone, partly hidden: masked modelling, and contrast between the same
two passes (MCR, 2312.15840: masked input for both saves a second pass). A share of the pairs also as one joint sequence:
here the image helps the words and the words the image, and mismatched reports teach matching.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch, Term, placed
from fedmix.errors import ConfigError, DataError
from fedmix.model.encoder import Encoded, MixedModel
from fedmix.model.layers import to_patches
from fedmix.objectives.alignment import (
    Past,
    contrast_term,
    hard_negatives,
    match_term,
    other_patients,
    sigmoid_contrast_term,
    similarity,
    soft_targets,
)
from fedmix.objectives.anchor import anchor_term
from fedmix.objectives.masking import WordIds, hide_patches, hide_words
from fedmix.objectives.memory import PastPairs
from fedmix.objectives.reconstruction import masked_patch_term, masked_word_term


@dataclass(frozen=True)
class Learner:
    """A model, the objectives of a stage, and the word ids: everything a step needs besides data and chance.

    ``start``: a frozen copy of the model as the round began, where an objective looks back to it. ``past``: pairs of the
    round's earlier steps, where contrast keeps some; a step adds its own.
    """

    model: MixedModel
    objectives: config.Objectives
    word_ids: WordIds
    start: MixedModel | None = None
    past: PastPairs | None = None

    def at_round_start(self) -> Learner:
        """The learner of a round that begins now."""
        looks_back = self.objectives.soft_targets or self.objectives.anchor
        past = PastPairs(self.objectives.queue) if self.objectives.queue else None
        return replace(self, start=_frozen(self.model) if looks_back else None, past=past)

    def terms(self, batch: Batch, generator: Generator) -> dict[str, Term]:
        """All terms that this batch allows: mvm, mlm, contrast, match, anchor. A term of weight 0 is not computed."""
        found: list[tuple[str, Term]] = []
        rows = _rows(batch)
        if batch.image is not None and len(rows.image_alone) and self.objectives.mvm:
            self._see(batch.image[rows.image_alone], self.objectives.hide_image_alone, generator, found)
        if batch.text is not None and len(rows.text_alone) and self.objectives.mlm:
            self._read(batch.text[rows.text_alone], self.objectives.hide_text_alone, generator, found)
        if batch.image is not None and batch.text is not None and len(rows.image_paired):
            pairs = _Pairs(batch.image[rows.image_paired], batch.text[rows.text_paired], self._patients(batch))
            self._pair(pairs, generator, found)
        return _added(found)

    def loss(self, terms: Mapping[str, Term]) -> Tensor:
        """The weighted sum of the terms' means: what a step descends."""
        if not terms:
            raise ConfigError(
                "no objective of this stage applies to the batch at hand; give mvm (images), mlm (reports) or contrast (pairs) "
                "a positive weight, or raise joint_share until match has two pairs to compare"
            )
        weights = self.objectives.model_dump(include={"mvm", "mlm", "contrast", "match", "anchor"})
        return torch.stack([weights[name] * term.mean() for name, term in terms.items()]).sum()

    def _pair(self, pairs: _Pairs, generator: Generator, found: list[tuple[str, Term]]) -> None:
        """Read both sides of the pairs alone and compare these readings, then a share of the pairs as one sequence."""
        seen = self._see(pairs.image_BSS, self.objectives.hide_image_paired, generator, found)
        read = self._read(pairs.words_BL, self.objectives.hide_text_paired, generator, found)
        wrong_B = self._align(seen, read, pairs, generator, found)
        self._join(replace(pairs, wrong_B=wrong_B), generator, found)

    def _see(self, image_BSS: Tensor, ratio: float, generator: Generator, found: list[tuple[str, Term]]) -> Encoded:
        """Read part of the images and predict the rest."""
        hidden = hide_patches(len(image_BSS), self.model.num_patches, ratio, generator)
        encoded = self.model.encode(image_BSS=image_BSS, visible_BK=hidden.visible_BK)
        if self.objectives.mvm:
            found.append(("mvm", self._patch_term(encoded, image_BSS, hidden.visible_BK, hidden.hidden_BP)))
        if self.objectives.anchor and self.start is not None:
            before = self.start.encode(image_BSS=image_BSS, visible_BK=hidden.visible_BK)
            found.append(("anchor", anchor_term(self.model.pool("image", encoded), self.start.pool("image", before))))
        return encoded

    def _read(self, words_BL: Tensor, ratio: float, generator: Generator, found: list[tuple[str, Term]]) -> Encoded:
        """Read part of the words and predict the rest."""
        hidden = hide_words(words_BL, ratio, self.word_ids, generator)
        encoded = self.model.encode(words_BL=hidden.words_BL)
        if self.objectives.mlm:
            found.append(("mlm", self._word_term(encoded, words_BL, hidden.hidden_BL)))
        if self.objectives.anchor and self.start is not None:
            before = self.start.encode(words_BL=hidden.words_BL)
            found.append(("anchor", anchor_term(self.model.pool("text", encoded), self.start.pool("text", before))))
        return encoded

    def _align(
        self, image: Encoded, text: Encoded, pairs: _Pairs, generator: Generator, found: list[tuple[str, Term]]
    ) -> Tensor | None:
        """Contrast between the two passes over the same pairs; returns the wrong report it finds hard for each image."""
        if not self.objectives.contrast:
            return None
        image_BE, text_BE = self.model.embed("image", image), self.model.embed("text", text)
        projection = self.model.projection
        if self.model.contrast_form == "sigmoid":
            term = sigmoid_contrast_term(
                image_BE, text_BE, projection.temperature(), projection.bias(), compared_BB=pairs.compared
            )
        else:
            term = contrast_term(
                image_BE,
                text_BE,
                projection.temperature(),
                label_smoothing=self.objectives.label_smoothing,
                target_BB=self._targets(pairs),
                compared_BB=pairs.compared,
                past=self._recall(image_BE, text_BE, pairs),
            )
        found.append(("contrast", term))
        if not self.objectives.match or self.objectives.match_negatives == "shifted":
            return None
        logits_BB = similarity(image_BE, text_BE) / projection.temperature()
        return hard_negatives(logits_BB, generator, compared_BB=pairs.compared)

    def _targets(self, pairs: _Pairs) -> Tensor | None:
        """Soft targets by whole reports as the round-start model reads them; outside a round, as the model itself does."""
        if not self.objectives.soft_targets:
            return None
        # No torch.no_grad: under autocast it would leave casts of the model's own weights behind that pass no gradient on.
        text_BE = (self.start or self.model).encode_text(pairs.words_BL)
        share, temperature = self.objectives.soft_targets, self.objectives.soft_temperature
        return soft_targets(text_BE, share=share, temperature=temperature, compared_BB=pairs.compared)

    def _recall(self, image_BE: Tensor, text_BE: Tensor, pairs: _Pairs) -> Past | None:
        """The pairs of earlier steps, before this step's join them."""
        if self.past is None or pairs.patient_B is None:
            return None
        kept = self.past.kept
        self.past.remember(image_BE, text_BE, pairs.patient_B)
        if kept is None:
            return None
        image_QE, text_QE, patient_Q = kept
        return Past(image_QE, text_QE, compared_BQ=pairs.patient_B[:, None] != patient_Q[None])

    def _patients(self, batch: Batch) -> Tensor | None:
        """The patient of each pair of the batch, where pairs of the same are left out."""
        if self.objectives.same_patient == "negative":
            return None
        if batch.patient is None:
            raise DataError("same_patient = left_out needs to know which studies are of one patient; the batch does not say")
        return batch.patient[batch.is_paired]

    def _join(self, pairs: _Pairs, generator: Generator, found: list[tuple[str, Term]]) -> None:
        """Read a share of the pairs as one sequence: words help patches, patches help words, mismatches teach matching."""
        num_joint = round(self.objectives.joint_share * len(pairs.image_BSS))
        hide_image, hide_text = self.objectives.hide_image_joint, self.objectives.hide_text_joint
        if self.objectives.joint_masking == "both":
            self._read_jointly(pairs, slice(0, num_joint), hide_image, hide_text, generator, found)
            return
        # What is whole tells what is hidden, each side in turn; chance says which side an odd pair goes to.
        num_whole_reports = (num_joint + int(torch.randint(2, (1,), generator=generator))) // 2
        self._read_jointly(pairs, slice(0, num_whole_reports), hide_image, 0.0, generator, found)
        self._read_jointly(pairs, slice(num_whole_reports, num_joint), 0.0, hide_text, generator, found)

    def _read_jointly(
        self,
        pairs: _Pairs,
        rows: slice,
        hide_image: float,
        hide_text: float,
        generator: Generator,
        found: list[tuple[str, Term]],
    ) -> None:
        """Read some pairs as joint sequences; a side of which nothing is hidden has nothing to predict."""
        image_BSS, words_BL = pairs.image_BSS[rows], pairs.words_BL[rows]
        num_pairs = len(image_BSS)
        if num_pairs == 0:
            return
        patches = hide_patches(num_pairs, self.model.num_patches, hide_image, generator)
        words = hide_words(words_BL, hide_text, self.word_ids, generator)
        swapped_N, wrong_NL = self._mismatch(pairs, rows, words.words_BL, hide_text, generator)
        encoded = self.model.encode(
            image_BSS=torch.cat([image_BSS, image_BSS[swapped_N]]),
            visible_BK=torch.cat([patches.visible_BK, patches.visible_BK[swapped_N]]),
            words_BL=torch.cat([words.words_BL, wrong_NL]),
        )
        if len(swapped_N):
            logit_B = self.model.match_head(encoded.tokens["image"][:, 0], encoded.tokens["text"][:, 0])
            found.append(("match", match_term(logit_B, torch.arange(len(logit_B)) < num_pairs)))
        true = Encoded({name: tokens_BTD[:num_pairs] for name, tokens_BTD in encoded.tokens.items()}, encoded.present_BL)
        if self.objectives.mvm and hide_image:
            found.append(("mvm", self._patch_term(true, image_BSS, patches.visible_BK, patches.hidden_BP)))
        if self.objectives.mlm and hide_text:
            found.append(("mlm", self._word_term(true, words_BL, words.hidden_BL)))

    def _mismatch(
        self, pairs: _Pairs, rows: slice, read_BL: Tensor, hide_text: float, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Which of the joint pairs ``rows`` ride along once more, and the wrong reports they get, as hidden as the right ones.

        A mismatch teaches nothing but matching, so there are half as many.
        """
        swapped_N = torch.arange(len(read_BL) // 2 if self.objectives.match else 0)
        if pairs.wrong_B is None:  # the neighbour's
            return swapped_N, read_BL.roll(1, dims=0)[: len(swapped_N)]
        wrong_N = pairs.wrong_B[rows][: len(swapped_N)]
        swapped_N, wrong_N = swapped_N[wrong_N >= 0], wrong_N[wrong_N >= 0]
        return swapped_N, hide_words(pairs.words_BL[wrong_N], hide_text, self.word_ids, generator).words_BL

    def _patch_term(self, encoded: Encoded, image_BSS: Tensor, visible_BK: Tensor, hidden_BP: Tensor) -> Term:
        predicted_BPV = self.model.decode_patches(encoded, visible_BK)
        patches_BPC = to_patches(image_BSS, self.model.patch_size)
        return masked_patch_term(predicted_BPV, patches_BPC, hidden_BP, kind=self.model.vision_target)

    def _word_term(self, encoded: Encoded, words_BL: Tensor, hidden_BL: Tensor) -> Term:
        # The CPU, where the batch lies, is asked which words are hidden: a GPU would have to be waited for.
        places_N = placed(hidden_BL.flatten().nonzero().flatten(), self.model.device)
        return masked_word_term(self.model.word_head(encoded.tokens["text"].flatten(0, 1)[places_N]), words_BL[hidden_BL])


def _frozen(model: MixedModel) -> MixedModel:
    """A copy that no gradient reaches."""
    return copy.deepcopy(model).requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a batch. ``patient_B``: whose they are, None if it does not matter.

    ``wrong_B``: whose report an image is wrongly given in matching, -1 for none; None: its neighbour's among the joint ones.
    """

    image_BSS: Tensor
    words_BL: Tensor
    patient_B: Tensor | None
    wrong_B: Tensor | None = None

    @property
    def compared(self) -> Tensor | None:
        """Bool [B, B], True where pair j may be a negative of pair i; None: everywhere."""
        return None if self.patient_B is None else other_patients(self.patient_B)


@dataclass(frozen=True)
class _Rows:
    image_alone: Tensor
    text_alone: Tensor
    image_paired: Tensor
    text_paired: Tensor


def _rows(batch: Batch) -> _Rows:
    paired_image, paired_text = batch.is_paired[batch.has_image], batch.is_paired[batch.has_text]
    return _Rows(
        image_alone=(~paired_image).nonzero().flatten(),
        text_alone=(~paired_text).nonzero().flatten(),
        image_paired=paired_image.nonzero().flatten(),
        text_paired=paired_text.nonzero().flatten(),
    )


def _added(found: list[tuple[str, Term]]) -> dict[str, Term]:
    """Terms of the same name added, never averaged."""
    terms: dict[str, Term] = {}
    for name, term in found:
        terms[name] = terms[name] + term if name in terms else term
    return terms
