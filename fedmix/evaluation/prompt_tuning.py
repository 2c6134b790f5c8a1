"""A few learned vectors in front of a finding's name, both towers frozen (CoOp, 2109.01134), on shares of the probe's labels.

How much of what a linear probe needs labels for, the model already knows by the finding's name. A finding may be there beside
others, so it is asked for twice, with context of its own to say it and to deny it (DualCoOp, 2206.09541): the logit is the
difference of the two cosines, times a scale, plus a bias for how frequent the finding is; these two are learned as well and
move no AUROC. Context is the same for all findings (CoOp's unified context), and begins as words.

Shapes: N, n studies, L words, M words of context, D width, E embedding, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmix.evaluation.classification import image_rows
from fedmix.evaluation.features import (
    EvaluationContext,
    Findings,
    NotEvaluableError,
    Vocabulary,
    device_of,
    encode_images,
    evaluating,
    padded,
)
from fedmix.evaluation.label_shares import probe_by_share, scores_by_share, shares_report
from fedmix.evaluation.tuning import has_both_classes, known_label_loss, minimise

OPENINGS = ("there is evidence of", "there is no evidence of")  # what context begins as, to say a finding and to deny it
CONTEXT_RATE, READING_RATE = 3e-2, 3e-2  # highest
FIRST_SCALE = 10.0  # of differences of cosines


@runtime_checkable
class PromptEncoder(Protocol):
    """An encoder that reads vectors in place of words."""

    def word_vectors(self, words_BL: Tensor) -> Tensor:
        """What words stand for before the text tower reads them, [B, L, D]."""

    def encode_vectors(self, vectors_BLD: Tensor, words_BL: Tensor) -> Tensor:
        """Unit-norm embeddings [B, E] of texts given by vectors; where ``words_BL`` is 0 there is nothing to read."""


class Side(NamedTuple):
    """Prompts that all say their finding, or all deny it: ids and their vectors; context is the M after the summary."""

    words_KL: Tensor
    vectors_KLD: Tensor
    num_context: int


class TunedPrompts(nn.Module):
    """Learned context before the names of K findings; embeddings of images [N, E] to logits [N, K]."""

    def __init__(self, encoder: PromptEncoder, sides: Sequence[Side]) -> None:
        super().__init__()
        self._encode = encoder.encode_vectors  # a bound method: the encoder's weights are not this module's parameters
        self._sides = tuple(sides)
        first = [side.vectors_KLD[0, 1 : 1 + side.num_context].clone() for side in sides]
        self.context = nn.ParameterList([nn.Parameter(context_MD) for context_MD in first])
        device, num_labels = first[0].device, len(sides[0].words_KL)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE, device=device).log())
        self.bias_K = nn.Parameter(torch.zeros(num_labels, device=device))

    def forward(self, image_NE: Tensor) -> Tensor:
        """Logits [N, K]."""
        said_KE, denied_KE = (self._embedded(side, own) for side, own in zip(self._sides, self.context, strict=True))
        return self.log_scale.exp() * image_NE @ (said_KE - denied_KE).T + self.bias_K

    def _embedded(self, side: Side, context_MD: Tensor) -> Tensor:
        before_K1D, after_KLD = side.vectors_KLD[:, :1], side.vectors_KLD[:, 1 + side.num_context :]
        context_KMD = context_MD.expand(len(before_K1D), -1, -1)
        return self._encode(torch.cat([before_K1D, context_KMD, after_KLD], dim=1), side.words_KL)


def prompt_sides(
    encoder: PromptEncoder, label_names: Sequence[str], vocabulary: Vocabulary, *, max_words: int, device: torch.device
) -> list[Side]:
    """The prompts of all findings before tuning, to say them and to deny them: the opening, and the label's own name."""
    sides = []
    for opening in OPENINGS:
        num_context = len(vocabulary.encode([opening], max_words)[0]) - 1
        texts = [f"{opening} {label.replace('_', ' ').lower()} ." for label in label_names]
        words = [np.asarray(ids, np.int64) for ids in vocabulary.encode(texts, max_words)]
        ids_KL = padded(words, torch.device("cpu"))  # a model asks the CPU which of them are padding
        with torch.no_grad():
            sides.append(Side(ids_KL, encoder.word_vectors(ids_KL.to(device)).clone(), num_context))
    return sides


def tuned_prompts(
    encoder: PromptEncoder, sides: Sequence[Side], image_NE: Tensor, labels_NK: Tensor, *, num_steps: int
) -> TunedPrompts:
    """Context learned on embeddings of training images and their labels, all of them in every step."""
    prompts = TunedPrompts(encoder, sides)
    groups = [
        {"params": list(prompts.context), "lr": CONTEXT_RATE, "weight_decay": 0.0},
        {"params": [prompts.log_scale, prompts.bias_K], "lr": READING_RATE, "weight_decay": 0.0},
    ]
    minimise(groups, lambda _: known_label_loss(prompts(image_NE), labels_NK), num_steps)
    return prompts


def evaluate_prompt_tuning(context: EvaluationContext) -> Findings:
    """Tuned prompts with growing shares of the labels, beside the linear probe on the same studies."""
    encoder, held_out, settings = context.encoder, context.held_out, context.settings
    if not isinstance(encoder, PromptEncoder):
        raise NotEvaluableError("the encoder reads words alone; a prompt is tuned as vectors")
    rows, _ = image_rows(context)
    train, test = context.probe_studies(image=True), context.test_studies(image=True, label=True)
    device = device_of(encoder)
    images = held_out.images_of(train)
    image_NE = torch.from_numpy(encode_images(context.encoder, images, batch_size=settings.batch_size)).to(device)
    test_NE = torch.from_numpy(context.image_embeddings(test)).to(device)
    sides = prompt_sides(encoder, held_out.label_names, context.vocabulary, max_words=settings.max_prompt_words, device=device)

    def scores(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        labels, chosen = rows.labels[drawn], torch.from_numpy(drawn).to(device)
        labels_NK = torch.from_numpy(labels).to(device).float()
        prompts = tuned_prompts(encoder, sides, image_NE[chosen], labels_NK, num_steps=settings.prompt_tune_steps)
        with torch.no_grad():
            found: NDArray[np.float64] = prompts(test_NE).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise NotEvaluableError("tuning a prompt gave values that are not finite; training has probably diverged")
        return np.where(has_both_classes(labels), found, np.nan)  # a label that no study of the draw teaches is guessed

    with evaluating(encoder):
        by_share = scores_by_share(context, len(train), scores)
    return Findings(shares_report(context, by_share, probe_by_share(context)))
