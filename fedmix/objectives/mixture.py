"""Which terms a batch allows: images alone, reports alone, pairs apart and pairs as one sequence.

A pair is read three ways. Image and report each alone, partly hidden: masked modelling, and contrast between the same
two passes (MCR, 2312.15840: masked input for both saves a second pass). A share of the pairs also as one joint sequence:
here the image helps the words and the words the image, and mismatched reports teach matching.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch, Term, placed
from fedmix.errors import ConfigError, DataError
from fedmix.model.encoder import Encoded, MixedModel
from fedmix.model.layers import pick, to_patches
from fedmix.objectives.alignment import (
    Past,
    contrast_term,
    hard_negatives,
    margin_contrast_term,
    match_term,
    sigmoid_contrast_term,
    similarity,
    soft_targets,
)
from fedmix.objectives.anchor import anchor_term, drift
from fedmix.objectives.local import local_term, sentences
from fedmix.objectives.masking import WordIds, hide_patches, hide_words
from fedmix.objectives.memory import PastPairs
from fedmix.objectives.readings import Pairs, Plan, Reading, rows_of
from fedmix.objectives.reconstruction import masked_patch_term, masked_word_term, patch_errors
from fedmix.objectives.semantic import Known, joined, known, semantic_term


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
        """All terms that this batch allows, by the names of their weights. A term of weight 0 is not computed."""
        found: list[tuple[str, Term]] = []
        plan = self.plan(batch, generator)
        encoded: list[Encoded] = []
        for reading in plan.readings:
            encoded.append(self.encode(reading))
            found += self.ask(reading, encoded[-1])
        if plan.pairs is not None:
            wrong_B = None
            if self.objectives.contrast:
                image_BE, text_BE = map(self.embedding, plan.readings[-2:], encoded[-2:])
                alike_BE = self.likeness(plan.pairs.words_BL) if self.objectives.soft_targets else None
                term, wrong_B = self.compare(image_BE, text_BE, plan.pairs, alike_BE, generator)
                found.append(("contrast", term))
            if self.objectives.local:
                found.append(("local", self.compare_parts(plan.pairs, *encoded[-2:])))
            for reading in self.join(plan.pairs, wrong_B, generator):
                found += self.ask(reading, self.encode(reading))
        return added([*found, *self.compare_findings(plan, encoded)])

    def loss(self, terms: Mapping[str, Term]) -> Tensor:
        """The weighted sum of the terms' means: what a step descends."""
        if not terms:
            raise ConfigError(
                "no objective of this stage applies to the batch at hand; give mvm (images), mlm (reports) or contrast (pairs) "
                "a positive weight, or raise joint_share until match has two pairs to compare"
            )
        weights = self.objectives.model_dump(include=set(config.WEIGHTS))
        return torch.stack([weights[name] * term.mean() for name, term in terms.items()]).sum()

    # The parts of a step, for one that computes them piece by piece (fedmix/federation/microbatch.py).

    def plan(self, batch: Batch, generator: Generator) -> Plan:
        """What a batch has the model read before its pairs are compared, with all that is hidden of it."""
        rows, readings, pairs = rows_of(batch), [], None
        wants_all = bool(self.objectives.semantic)
        if batch.image is not None and len(rows.image_alone) and (self.objectives.mvm or wants_all):
            alone = self._images(batch.image[rows.image_alone], self.objectives.hide_image_alone, generator)
            readings.append(self._with_findings(alone, batch, batch.has_image & ~batch.has_text))
        if batch.text is not None and len(rows.text_alone) and (self.objectives.mlm or wants_all):
            alone = self._reports(batch.text[rows.text_alone], self.objectives.hide_text_alone, generator)
            readings.append(self._with_findings(alone, batch, batch.has_text & ~batch.has_image))
        if batch.image is not None and batch.text is not None and len(rows.image_paired):
            pairs = Pairs(batch.image[rows.image_paired], batch.text[rows.text_paired], self._patients(batch))
            for side in (
                self._images(pairs.image_BSS, self.objectives.hide_image_paired, generator),
                self._reports(pairs.words_BL, self.objectives.hide_text_paired, generator),
            ):
                readings.append(self._with_findings(side, batch, batch.is_paired))
        return Plan(tuple(readings), pairs)

    def encode(self, reading: Reading) -> Encoded:
        """Run the trunk over a reading."""
        return self.model.encode(image_BSS=reading.image_NSS, visible_BK=reading.visible_NK, words_BL=reading.read_NL)

    def ask(self, reading: Reading, encoded: Encoded) -> list[tuple[str, Term]]:
        """The terms that a reading is asked for, by name."""
        found: list[tuple[str, Term]] = []
        if reading.asks_match:
            logit_N = self.model.match_head(encoded.tokens["image"][:, 0], encoded.tokens["text"][:, 0])
            found.append(("match", match_term(logit_N, torch.arange(len(logit_N)) < reading.num_true)))
        true = _first(encoded, reading.num_true) if reading.num_true < len(reading) else encoded
        if reading.num_true and reading.hidden_MP is not None:
            found.append(("mvm", self._patch_term(true, reading, reading.hidden_MP)))
        if reading.num_true and reading.hidden_ML is not None:
            found.append(("mlm", self._word_term(true, reading, reading.hidden_ML)))
        if reading.asks_anchor and self.start is not None:
            before = self.start.encode(image_BSS=reading.image_NSS, visible_BK=reading.visible_NK, words_BL=reading.read_NL)
            now_ND, start_ND = self.model.pool(reading.modality, encoded), self.start.pool(reading.modality, before)
            found.append(("anchor", anchor_term(now_ND, start_ND)))
        return found

    # The parts of a step that knows what each study adds to its loss (fedmix/federation/private.py).

    def plan_each(self, batch: Batch, generator: Generator) -> list[tuple[Reading, Tensor]]:
        """What a batch has the model read, and which study of the batch each row is of; nothing compares two studies.

        What is hidden of a study, and whether a pair is read as one sequence too, depends on no other study: ``joint_share``
        is each pair's own chance here.
        """
        rows, plan = rows_of(batch), self.plan(batch, generator)
        of_image_N, of_text_N = batch.has_image.nonzero().flatten(), batch.has_text.nonzero().flatten()
        whose = {"image": of_image_N[rows.image_alone], "text": of_text_N[rows.text_alone]}
        alone = plan.readings if plan.pairs is None else plan.readings[:-2]
        found = [(reading, whose[reading.modality]) for reading in alone]
        if plan.pairs is None:
            return found
        paired_B = of_image_N[rows.image_paired]
        found += [(reading, paired_B) for reading in plan.readings[-2:]]
        joint_B = torch.rand(len(paired_B), generator=generator) < self.objectives.joint_share
        joint = Pairs(plan.pairs.image_BSS[joint_B], plan.pairs.words_BL[joint_B], None)
        every = replace(self, objectives=self.objectives.model_copy(update={"joint_share": 1.0}))
        return found + [(reading, paired_B[joint_B]) for reading in every.join(joint, None, generator)]

    def ask_each(self, reading: Reading, encoded: Encoded) -> dict[str, Tensor]:
        """Totals [N] of the terms that a reading is asked for, study by study: ``ask`` before it adds them up.

        Every module reads studies in its first dimension, also the word head: a study's hidden words are one row.
        """
        found: dict[str, Tensor] = {}
        if reading.hidden_MP is not None:
            assert reading.image_NSS is not None
            assert reading.visible_NK is not None
            predicted_NPV = self.model.decode_patches(encoded, reading.visible_NK)
            patches_NPC = to_patches(reading.image_NSS, self.model.patch_size)
            error_NP = patch_errors(predicted_NPV, patches_NPC, kind=self.model.vision_target)
            found["mvm"] = (error_NP * placed(reading.hidden_MP, self.model.device)).sum(dim=1)
        if reading.hidden_ML is not None:
            found["mlm"] = self._word_totals(encoded, reading, reading.hidden_ML)
        if reading.asks_anchor and self.start is not None:
            before = self.start.encode(image_BSS=reading.image_NSS, visible_BK=reading.visible_NK, words_BL=reading.read_NL)
            found["anchor"] = drift(self.model.pool(reading.modality, encoded), self.model.pool(reading.modality, before))
        return found

    def embedding(self, reading: Reading, encoded: Encoded) -> Tensor:
        """Unit-norm embeddings [N, E] of a reading of images alone or of reports alone."""
        return self.model.embed(reading.modality, encoded)

    def compare(
        self, image_BE: Tensor, text_BE: Tensor, pairs: Pairs, alike_BE: Tensor | None, generator: Generator
    ) -> tuple[Term, Tensor | None]:
        """Contrast between two readings of the same pairs, and the wrong report [B] that it finds hard for each image.

        ``alike_BE``: the reports' features for soft targets (``likeness``). Wrong reports are None where matching takes others.
        """
        projection, compared_BB = self.model.projection, pairs.compared
        if self.model.contrast_form == "margin":
            term = margin_contrast_term(image_BE, text_BE, compared_BB=compared_BB)
        elif self.model.contrast_form == "sigmoid":
            term = sigmoid_contrast_term(
                image_BE, text_BE, projection.temperature(), projection.bias(), compared_BB=compared_BB
            )
        else:
            term = contrast_term(
                image_BE,
                text_BE,
                projection.temperature(),
                label_smoothing=self.objectives.label_smoothing,
                target_BB=self._targets(alike_BE, compared_BB),
                compared_BB=compared_BB,
                past=self._recall(image_BE, text_BE, pairs),
            )
        if not self.objectives.match or self.objectives.match_negatives == "shifted":
            return term, None
        logits_BB = similarity(image_BE, text_BE) / projection.temperature()
        return term, hard_negatives(logits_BB, generator, compared_BB=compared_BB)

    def compare_parts(self, pairs: Pairs, image: Encoded, text: Encoded) -> Term:
        """Contrast between the patches and the sentences of the same pairs."""
        sentence_BML = placed(sentences(pairs.words_BL, self.word_ids), self.model.device)
        return local_term(
            self.model.embed_patches(image),
            self.model.embed_sentences(text, sentence_BML),
            sentence_BML.any(dim=-1),
            self.model.projection.temperature(),
            compared_BB=pairs.compared,
        )

    def compare_findings(self, plan: Plan, encoded: Sequence[Encoded]) -> Iterator[tuple[str, Term]]:
        """Contrast between all images and all reports of which findings are known, where the batch has both."""
        sides: dict[str, list[Known]] = {"image": [], "text": []}
        for reading, tokens in zip(plan.readings, encoded, strict=True):
            if reading.findings_NF is not None:
                sides[reading.modality].append(known(self.embedding(reading, tokens), reading.findings_NF))
        images, texts = (joined(side) for side in sides.values())
        if images is not None and texts is not None:
            temperature = self.model.projection.temperature()
            yield "semantic", semantic_term(images, texts, temperature, likeness_temperature=self.objectives.soft_temperature)

    def likeness(self, words_BL: Tensor) -> Tensor:
        """Features [B, E] of whole reports as the round-start model reads them; outside a round, as the model itself does."""
        # No torch.no_grad: under autocast it would leave casts of the model's own weights behind that pass no gradient on.
        return (self.start or self.model).encode_text(words_BL)

    def join(self, pairs: Pairs, wrong_B: Tensor | None, generator: Generator) -> list[Reading]:
        """Readings of a share of the pairs as one sequence: words help patches, patches help words, mismatches teach matching.

        ``wrong_B``: whose report an image is wrongly given, -1 for none; None: its neighbour's among the joint ones.
        """
        num_joint = round(self.objectives.joint_share * len(pairs.image_BSS))
        hide_image, hide_text = self.objectives.hide_image_joint, self.objectives.hide_text_joint
        asked = [(slice(0, num_joint), hide_image, hide_text)]
        if self.objectives.joint_masking == "one_at_a_time":
            # What is whole tells what is hidden, each side in turn; chance says which side an odd pair goes to.
            num_whole = (num_joint + int(torch.randint(2, (1,), generator=generator))) // 2
            asked = [(slice(0, num_whole), hide_image, 0.0), (slice(num_whole, num_joint), 0.0, hide_text)]
        return [
            self._joint(pairs, rows, wrong_B, _Hide(image, text), generator)
            for rows, image, text in asked
            if len(pairs.image_BSS[rows])
        ]

    def _images(self, image_NSS: Tensor, ratio: float, generator: Generator) -> Reading:
        """Read part of the images and predict the rest."""
        patches = hide_patches(len(image_NSS), self.model.num_patches, ratio, generator)
        return Reading(
            len(image_NSS),
            image_NSS=image_NSS,
            visible_NK=patches.visible_BK,
            hidden_MP=patches.hidden_BP if self.objectives.mvm else None,
            asks_anchor=self._asks_anchor,
        )

    def _reports(self, words_NL: Tensor, ratio: float, generator: Generator) -> Reading:
        """Read part of the words and predict the rest."""
        words = hide_words(words_NL, ratio, self.word_ids, generator)
        return Reading(
            len(words_NL),
            read_NL=words.words_BL,
            words_ML=words_NL,
            hidden_ML=words.hidden_BL if self.objectives.mlm else None,
            asks_anchor=self._asks_anchor,
        )

    def _with_findings(self, reading: Reading, batch: Batch, is_read_B: Tensor) -> Reading:
        """The reading with the findings of the studies that it is of, where an objective compares them."""
        if not self.objectives.semantic:
            return reading
        if batch.findings is None:
            raise DataError("semantic compares findings, and the batch does not say any; give its sampler a FindingsReader")
        return replace(reading, findings_NF=batch.findings[is_read_B])

    @property
    def _asks_anchor(self) -> bool:
        return bool(self.objectives.anchor) and self.start is not None

    def _joint(self, pairs: Pairs, rows: slice, wrong_B: Tensor | None, hide: _Hide, generator: Generator) -> Reading:
        """Some pairs as joint sequences, then mismatches; a side of which nothing is hidden has nothing to predict."""
        image_BSS, words_BL = pairs.image_BSS[rows], pairs.words_BL[rows]
        patches = hide_patches(len(image_BSS), self.model.num_patches, hide.image, generator)
        words = hide_words(words_BL, hide.text, self.word_ids, generator)
        # A mismatch teaches nothing but matching, so there are half as many.
        swapped_N = torch.arange(len(words_BL) // 2 if self.objectives.match else 0)
        if wrong_B is None:  # the neighbour's
            wrong_NL = words.words_BL.roll(1, dims=0)[: len(swapped_N)]
        else:  # hidden as much as the right ones
            wrong_N = wrong_B[rows][: len(swapped_N)]
            swapped_N, wrong_N = swapped_N[wrong_N >= 0], wrong_N[wrong_N >= 0]
            wrong_NL = hide_words(pairs.words_BL[wrong_N], hide.text, self.word_ids, generator).words_BL
        return Reading(
            len(image_BSS),
            image_NSS=torch.cat([image_BSS, image_BSS[swapped_N]]),
            visible_NK=torch.cat([patches.visible_BK, patches.visible_BK[swapped_N]]),
            hidden_MP=patches.hidden_BP if self.objectives.mvm and hide.image else None,
            read_NL=torch.cat([words.words_BL, wrong_NL]),
            words_ML=words_BL,
            hidden_ML=words.hidden_BL if self.objectives.mlm and hide.text else None,
            asks_match=len(swapped_N) > 0,
        )

    def _targets(self, alike_BE: Tensor | None, compared_BB: Tensor | None) -> Tensor | None:
        if alike_BE is None:
            return None
        share, temperature = self.objectives.soft_targets, self.objectives.soft_temperature
        return soft_targets(alike_BE, share=share, temperature=temperature, compared_BB=compared_BB)

    def _recall(self, image_BE: Tensor, text_BE: Tensor, pairs: Pairs) -> Past | None:
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

    def _patch_term(self, encoded: Encoded, reading: Reading, hidden_MP: Tensor) -> Term:
        assert reading.image_NSS is not None
        assert reading.visible_NK is not None
        predicted_MPV = self.model.decode_patches(encoded, reading.visible_NK[: reading.num_true])
        patches_MPC = to_patches(reading.image_NSS[: reading.num_true], self.model.patch_size)
        return masked_patch_term(predicted_MPV, patches_MPC, hidden_MP, kind=self.model.vision_target)

    def _word_term(self, encoded: Encoded, reading: Reading, hidden_ML: Tensor) -> Term:
        assert reading.words_ML is not None
        # The CPU, where the batch lies, is asked which words are hidden: a GPU would have to be waited for.
        places_N = placed(hidden_ML.flatten().nonzero().flatten(), self.model.device)
        logits_NV = self.model.word_head(encoded.tokens["text"].flatten(0, 1)[places_N])
        return masked_word_term(logits_NV, reading.words_ML[hidden_ML])

    def _word_totals(self, encoded: Encoded, reading: Reading, hidden_NL: Tensor) -> Tensor:
        """Cross-entropy [N] of each study's hidden words."""
        assert reading.words_ML is not None
        # The hidden words first, as many places as the study has that hides most; the others' surplus counts nothing.
        places_NH = hidden_NL.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(hidden_NL.sum(dim=1).max())]
        counts_NH = placed(hidden_NL.gather(1, places_NH), self.model.device)
        words_NH = placed(reading.words_ML.gather(1, places_NH), self.model.device)
        logits_NHV = self.model.word_head(pick(encoded.tokens["text"], placed(places_NH, self.model.device)))
        error_NH = F.cross_entropy(logits_NHV.float().mT, words_NH, reduction="none")
        return (error_NH * counts_NH).sum(dim=1)


def _first(encoded: Encoded, num: int) -> Encoded:
    """The first rows alone."""
    return Encoded({name: tokens_NTD[:num] for name, tokens_NTD in encoded.tokens.items()}, encoded.present_BL)


def _frozen(model: MixedModel) -> MixedModel:
    """A copy that no gradient reaches."""
    return copy.deepcopy(model).requires_grad_(requires_grad=False)


class _Hide(NamedTuple):
    """How much is hidden of either side of a joint sequence."""

    image: float
    text: float


def added(found: Iterable[tuple[str, Term]]) -> dict[str, Term]:
    """Terms of the same name added, never averaged."""
    terms: dict[str, Term] = {}
    for name, term in found:
        terms[name] = terms[name] + term if name in terms else term
    return terms
