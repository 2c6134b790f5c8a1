"""What an evaluator is given: an encoder, studies no site ever trained on (held_out.py), and what the encoder says of them.

Everything here runs without gradients and puts the encoder back into the mode it came in. ``torch.no_grad`` is used and
not ``inference_mode``: an encoder may cache a table (positions, a mask) on its first call, and a table born in
inference mode breaks the next training step.

Shapes: N studies, S pixels a side, L words, E embedding, F features, K labels, P patches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmix.errors import ConfigError, DataError, FedmixError
from fedmix.evaluation.held_out import HeldOut

Kept = TypeVar("Kept")
Report = dict[str, Any]  # a branch of report.json: only dicts, lists, strings, numbers and None
Prompts = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # label -> (positive sentences, negative sentences)


class NotEvaluableError(FedmixError):
    """A task has no answer for this encoder or held-out set; the report carries the message as the reason."""


class Encoder(Protocol):
    """What evaluation asks of a model; pixels are 0..1, word ids are padded with 0, embeddings have unit norm."""

    @property
    def patch_size(self) -> int:
        """Pixels a side of one patch."""

    @property
    def image_size(self) -> int:
        """Pixels a side of one image."""

    def encode_image(self, image_BSS: Tensor) -> Tensor:
        """Unit-norm embeddings [B, E]."""

    def encode_text(self, words_BL: Tensor) -> Tensor:
        """Unit-norm embeddings [B, E]."""

    def image_features(self, image_BSS: Tensor) -> Tensor:
        """Features [B, F] for a probe."""

    def text_features(self, words_BL: Tensor) -> Tensor:
        """Features [B, F] for a probe."""

    def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
        """Every patch predicted from those that are not hidden: [B, S, S], unclamped."""

    def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
        """Scores [B, L, V] of each word of the vocabulary at each place."""

    def match_logits(self, image_BSS: Tensor, words_BL: Tensor) -> Tensor:
        """Logits [B] that image and report of each row belong together."""


class Vocabulary(Protocol):
    """The part of a tokenizer that evaluation uses."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def mask_id(self) -> int:
        """The id that hides a word."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no words and are never hidden."""

    def encode(self, texts: Sequence[str], max_words: int) -> list[list[int]]:
        """Ids of each text, the summary token first."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the tokens that are no words."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How much to evaluate and with which seed; every number is the same for every method that is compared."""

    gallery: int = 500  # studies a query chooses from; recall depends on it, so it is fixed
    mask_ratio: float = 0.75  # share of patches hidden for regeneration (MAE)
    text_mask_ratio: float = 0.15  # share of words hidden for the language task (BERT)
    num_probe_train: int = 1000  # labelled studies that train the linear probe
    num_few_train: int = 100  # labelled studies that train the few-label probe
    num_bootstrap: int = 200  # resamples of patients behind each 95 % interval; 0 leaves intervals out
    max_images_regeneration: int = 500
    max_images_triggers: int = 500
    max_texts_language: int = 1000
    max_prompt_words: int = 64
    num_examples: int = 4  # studies shown in the report's pictures
    batch_size: int = 256
    seed: int = 0
    rerank_top: int = 0  # candidates of a query that the match head puts in order anew; 0 leaves re-ranking out
    fine_tune_steps: int = 0  # most steps of each fine-tuning; 0 leaves it out
    prompt_tune_steps: int = 0  # steps of each tuning of a prompt; 0 leaves it out
    trained_on: tuple[str, ...] | None = None  # no choice but a fact: the model's objectives, None if they are not known

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("mask_ratio", "text_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"evaluation {name} is {getattr(self, name)}, expected more than 0 and less than 1")
        may_be_zero = ("num_bootstrap", "num_examples", "seed", "rerank_top", "fine_tune_steps", "prompt_tune_steps")
        for name, value in vars(self).items():
            least = 0 if name in may_be_zero else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"evaluation {name} is {value}, expected at least {least}")


@dataclass(frozen=True)
class Findings:
    """What one task found: its branch of report.json, arrays for pictures, and parts it had to skip (name -> reason)."""

    values: Report
    examples: Any = None
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationContext:
    """All a task may look at; what several tasks need of the encoder is computed once and kept."""

    encoder: Encoder
    held_out: HeldOut
    vocabulary: Vocabulary
    prompts: Prompts
    settings: EvaluationSettings

    def __post_init__(self) -> None:
        """An encoder of another image size would fail later, in the middle of a task."""
        images = self.held_out.images
        if images is not None and images.shape[1] != self.encoder.image_size:
            raise DataError(
                f"held-out images are {images.shape[1]} pixels a side, the model expects {self.encoder.image_size}; "
                "prepare the held-out set at the model's size"
            )

    def test_studies(
        self, *, image: bool = False, text: bool = False, label: bool = False, most: int | None = None
    ) -> NDArray[np.int64]:
        """Indices of the test studies that own all that is asked for, at most ``most`` of them drawn at random.

        NotEvaluableError if there are fewer than two.
        """
        studies = self._studies(~self.held_out.is_probe_train, image=image, text=text, label=label)
        if len(studies) < 2:
            asked = [name for name, wanted in (("an image", image), ("a report", text), ("a label", label)) if wanted]
            raise NotEvaluableError(f"{len(studies)} test studies have {' and '.join(asked)}; at least 2 are needed")
        return np.sort(random_for(self.settings.seed, "test studies").permutation(studies)[:most])

    def probe_studies(self, *, image: bool = False, text: bool = False) -> NDArray[np.int64]:
        """Indices of the labelled studies that may train a probe; NotEvaluableError if there are fewer than two."""
        studies = self._studies(self.held_out.is_probe_train, image=image, text=text, label=True)
        if len(studies) < 2:
            raise NotEvaluableError(f"{len(studies)} labelled studies may train a probe; at least 2 are needed")
        return studies

    def _studies(self, chosen: NDArray[np.bool_], *, image: bool, text: bool, label: bool) -> NDArray[np.int64]:
        held_out = self.held_out
        for wanted, present in ((image, held_out.has_image), (text, held_out.has_text), (label, held_out.has_label)):
            chosen = chosen & present if wanted else chosen
        return np.flatnonzero(chosen)

    def once(self, name: str, compute: Callable[[], Kept]) -> Kept:
        """What ``compute`` gives, computed by the first task that asks for it under this name."""
        if name not in self._kept:
            self._kept[name] = compute()
        kept: Kept = self._kept[name]
        return kept

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _test_images(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        studies = self.test_studies(image=True)
        return studies, encode_images(self.encoder, self.held_out.images_of(studies), batch_size=self.settings.batch_size)

    def image_embeddings(self, studies: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [n, E] of test studies with an image, encoded once for all tasks."""
        encoded, embeddings = self._test_images
        return embeddings[np.searchsorted(encoded, studies)]

    @cached_property
    def _labelled_images(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        studies = np.sort(np.concatenate([self.probe_studies(image=True), self.test_studies(image=True, label=True)]))
        return studies, image_features(self.encoder, self.held_out.images_of(studies), batch_size=self.settings.batch_size)

    def image_features(self, studies: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features [n, F] of labelled studies with an image, computed once for all probes."""
        computed, features = self._labelled_images
        return features[np.searchsorted(computed, studies)]


def random_for(seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on nothing but the seed and what it is used for, so tasks cannot disturb each other."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def device_of(encoder: object) -> torch.device:
    """Where the encoder lives: the device of its first parameter; the CPU for one without parameters."""
    if isinstance(encoder, nn.Module):
        for parameter in encoder.parameters():
            return parameter.device
    return torch.device("cpu")


@contextmanager
def evaluating(encoder: object) -> Iterator[None]:
    """No gradients and evaluation mode inside; afterwards every submodule is in the mode it was in before."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    was_training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training


def pixels(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Images uint8 [B, S, S] as the encoder wants them: float 0..1 on its device."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255


def padded(words: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Ids [B, L] padded with 0 to the longest text of the batch."""
    ids_BL = np.zeros((len(words), max(map(len, words))), np.int64)
    for row, ids in zip(ids_BL, words, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(ids_BL).to(device)


def batches_by_length(words: Sequence[NDArray[np.int64]], batch_size: int) -> list[NDArray[np.int64]]:
    """Row indices, grouped so that texts of similar length share a batch: little padding, little waste."""
    order = np.argsort([len(ids) for ids in words], kind="stable").astype(np.int64)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def encode_images(encoder: Encoder, images: NDArray[np.uint8], *, batch_size: int = 256) -> NDArray[np.float32]:
    """Embeddings [N, E] of images uint8 [N, S, S], in their order."""
    return _over_images(encoder, encoder.encode_image, images, batch_size)


def image_features(encoder: Encoder, images: NDArray[np.uint8], *, batch_size: int = 256) -> NDArray[np.float32]:
    """Probe features [N, F] of images uint8 [N, S, S], in their order."""
    return _over_images(encoder, encoder.image_features, images, batch_size)


def encode_texts(encoder: Encoder, words: Sequence[NDArray[np.int64]], *, batch_size: int = 256) -> NDArray[np.float32]:
    """Embeddings [N, E] of non-empty texts, in their order."""
    return _over_texts(encoder, encoder.encode_text, words, batch_size)


def text_features(encoder: Encoder, words: Sequence[NDArray[np.int64]], *, batch_size: int = 256) -> NDArray[np.float32]:
    """Probe features [N, F] of non-empty texts, in their order."""
    return _over_texts(encoder, encoder.text_features, words, batch_size)


def _over_images(
    encoder: Encoder, call: Callable[[Tensor], Tensor], images: NDArray[np.uint8], batch_size: int
) -> NDArray[np.float32]:
    device = device_of(encoder)
    with evaluating(encoder):
        parts = [call(pixels(images[i : i + batch_size], device)).float().cpu() for i in range(0, len(images), batch_size)]
    return _finite(torch.cat(parts))


def _over_texts(
    encoder: Encoder, call: Callable[[Tensor], Tensor], words: Sequence[NDArray[np.int64]], batch_size: int
) -> NDArray[np.float32]:
    device = device_of(encoder)
    groups = batches_by_length(words, batch_size)
    with evaluating(encoder):
        parts = [call(padded([words[row] for row in rows], device)).float().cpu() for rows in groups]
    rows_in_order = torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(groups)))]
    return _finite(rows_in_order)


def _finite(values: Tensor) -> NDArray[np.float32]:
    # A diverged model must end in a report that says so, not in a stack trace from inside scikit-learn.
    if not bool(values.isfinite().all()):
        raise NotEvaluableError("the encoder returned values that are not finite; training has probably diverged")
    array: NDArray[np.float32] = values.numpy()
    return array
