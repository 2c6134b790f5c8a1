"""Pictures and sentences in; embeddings, similarities, redrawn pictures and filled-in words out.

Pictures and reports pass through the very functions that prepared the shards, so that a model is never shown what it was
not trained on. A study's numbers do not depend on which others are asked about at the same time.

Shapes: N images, M texts, E embedding, H, W rows and columns of a picture, S pixels a side, P patches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedmix.data.images import ImageOptions, Picture, prepare_image
from fedmix.data.reports import clean, has_words
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError, RunError
from fedmix.evaluation import features, regeneration, reranking
from fedmix.model.encoder import MixedModel
from fedmix.model.folder import load_model
from fedmix.objectives.masking import hide_patches
from fedmix.trained.preparation import FILE, read_preparation

BATCH_SIZE = 64  # bounds memory: a list of any length is prepared and read this many at a time
BLANK = re.compile(r"\[MASK\]|_{3,}")  # "___" is what MIMIC's reports have where words were taken out


class Redrawn(NamedTuple):
    """``image``: float32 [S, S] in 0..1, the truth where it was shown; ``hidden``: bool [P], True where it was drawn."""

    image: NDArray[np.float32]
    hidden: NDArray[np.bool_]


class Candidate(NamedTuple):
    """A word of the vocabulary for a blank; "##" starts a piece that goes on from the word before."""

    word: str
    probability: float


class FedmixModel:
    """A trained model in evaluation mode; every call is without gradients and leaves it as it was."""

    def __init__(
        self,
        network: MixedModel,
        tokenizer: Tokenizer,
        *,
        max_words: int,
        preparation: ImageOptions,
        trained_on: tuple[str, ...] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.max_words, self.preparation = tokenizer, max_words, preparation
        self.trained_on = trained_on  # objectives by name; None: the folder does not say

    def encode_image(self, images: Sequence[Picture] | NDArray[Any]) -> NDArray[np.float32]:
        """Unit-norm embeddings [N, E] of Pillow images, PNG or JPEG bytes, or arrays [N, H, W] (fedmix/data/images.py)."""
        batches = _batches(images, "images")
        encoded = [features.encode_images(self.network, self._prepared(batch, first)) for first, batch in batches]
        return np.concatenate([self._no_rows(), *encoded])

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm embeddings [M, E]; a text longer than the model reads is cut, as reports were in training."""
        encoded = [features.encode_texts(self.network, self._words(batch, first)) for first, batch in _batches(texts, "texts")]
        return np.concatenate([self._no_rows(), *encoded])

    def similarity(self, images: Sequence[Picture] | NDArray[Any], texts: Sequence[str]) -> NDArray[np.float32]:
        """Cosine similarity [N, M] of each image with each text."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def probabilities(self, images: Sequence[Picture] | NDArray[Any], texts: Sequence[str]) -> NDArray[np.float32]:
        """How the model would share one image out among the texts, [N, M]: rows add up to one, at its own temperature.

        They compare the given texts with each other and are no probability of a disease.
        """
        temperature = float(self.network.projection.temperature())
        shares: NDArray[np.float32] = torch.from_numpy(self.similarity(images, texts) / temperature).softmax(dim=1).numpy()
        return shares

    def match(self, images: Sequence[Picture] | NDArray[Any], texts: Sequence[str]) -> NDArray[np.float32]:
        """Probability [N, M] that each text is the report of each image, by the match head, which reads both together.

        One pass of the model for each two: to search among many, take the first by ``similarity`` and order those by this.
        DataError for a model that was never trained on matching.
        """
        if self.trained_on is not None and "match" not in self.trained_on:
            raise DataError(f"{reranking.NEVER_TRAINED}; similarity compares images and texts without it")
        squares = [self._prepared(batch, first) for first, batch in _batches(images, "images")]
        words = [ids for first, batch in _batches(texts, "texts") for ids in self._words(batch, first)]
        if not squares or not words:
            return np.empty((sum(map(len, squares)), len(words)), np.float32)
        logits = [
            reranking.match_logits(self.network, batch, words, np.ones((len(batch), len(words)), bool), batch_size=BATCH_SIZE)
            for batch in squares
        ]
        shares: NDArray[np.float32] = torch.from_numpy(np.concatenate(logits)).sigmoid().float().numpy()
        return shares

    def regenerate(
        self,
        image: Picture,
        hidden: Any = None,
        *,
        mask_ratio: float | None = None,
        generator: torch.Generator | None = None,
        report: str | None = None,
    ) -> Redrawn:
        """Draw the hidden patches from the others and, if given, the report.

        Either ``hidden`` says which, or a share ``mask_ratio`` is hidden at random; without a ``generator`` it is the same
        share every time. ``hidden`` may be the numbers of patches, counted row by row from 0; bool [P] or a grid of P; or bool
        [S, S] over the pixels of the square picture that the model sees: a patch of which any pixel is hidden is hidden.
        """
        if (hidden is None) == (mask_ratio is None):
            raise DataError("regenerate takes either hidden or mask_ratio; give one of them")
        hidden_P = self._drawn(mask_ratio, generator) if mask_ratio is not None else self._hidden(hidden)
        masked = regeneration.MaskedImages(self._prepared([image], 0), hidden_P[None], self.network.patch_size)
        words = None if report is None else self._words([report], 0)
        return Redrawn(regeneration.regenerate(self.network, masked, words)[0], hidden_P)

    def fill_words(self, text: str, image: Picture | None = None, *, top_k: int = 5) -> list[list[Candidate]]:
        """For each [MASK] or ___ of the text the likeliest words, from the words around it and, if given, the image.

        Probabilities are over all words of the vocabulary; padding and its like, which are no words, are left out.
        """
        if not 1 <= top_k <= self.tokenizer.vocab_size - len(self.tokenizer.special_ids):
            raise DataError(f"top_k is {top_k}, expected at least 1 and at most the number of words in the vocabulary")
        ids, blanks = self._with_blanks(text)
        pictures = None if image is None else features.pixels(self._prepared([image], 0), self._device)
        with features.evaluating(self.network):
            logits_NV = self.network.word_logits(features.padded([ids], self._device), pictures)[0, blanks].float().cpu()
        if not bool(logits_NV.isfinite().all()):
            raise features.NotEvaluableError("the word scores are not finite; training has probably diverged")
        logits_NV[:, sorted(self.tokenizer.special_ids)] = float("-inf")
        best = logits_NV.softmax(dim=-1).topk(top_k, dim=-1)
        return [
            [Candidate(self.tokenizer.token(number), share) for share, number in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @property
    def _device(self) -> torch.device:
        return features.device_of(self.network)

    def _no_rows(self) -> NDArray[np.float32]:
        return np.empty((0, self.network.projection.image.out_features), np.float32)

    def _prepared(self, images: Sequence[Picture], first: int) -> NDArray[np.uint8]:
        """Images uint8 [n, S, S]; ``first`` is the number of the first one in what the caller handed over."""
        squares = []
        for number, image in enumerate(images, first):
            try:
                squares.append(prepare_image(image, self.preparation))
            except DataError as error:
                raise DataError(f"image {number}: {error}") from None
        return np.stack(squares)

    def _words(self, texts: Sequence[str], first: int) -> list[NDArray[np.int64]]:
        lines = []
        for number, text in enumerate(texts, first):
            if not isinstance(text, str):
                raise DataError(f"text {number}: expected a string, got {type(text).__name__}")
            try:
                lines.append(clean(text))
            except DataError as error:
                raise DataError(f"text {number}: {error}") from None
            if not has_words(lines[-1]):
                raise DataError(f"text {number}: it holds neither a letter nor a digit; leave it out")
        return [np.array(ids, np.int64) for ids in self.tokenizer.encode(lines, self.max_words)]

    def _with_blanks(self, text: str) -> tuple[NDArray[np.int64], list[int]]:
        """Ids with the mask id in every blank, and where these are."""
        pieces = self.tokenizer.encode(BLANK.split(clean(text)), self.max_words)
        ids, blanks = list(pieces[0]), []
        for piece in pieces[1:]:
            blanks.append(len(ids))
            ids += [self.tokenizer.mask_id, *piece[1:]]
        if not blanks:
            raise DataError("the text has no blank; write [MASK] or ___ where a word is to be filled in")
        if blanks[-1] >= self.max_words:
            raise DataError(f"a blank lies beyond the {self.max_words} words that this model reads; shorten the text before it")
        return np.array(ids[: self.max_words], np.int64), blanks

    def _drawn(self, mask_ratio: float, generator: torch.Generator | None) -> NDArray[np.bool_]:
        if not 0 < mask_ratio < 1:
            raise DataError(f"mask_ratio is {mask_ratio}, expected more than 0 and less than 1")
        generator = generator or torch.Generator().manual_seed(0)
        drawn: NDArray[np.bool_] = hide_patches(1, self.network.num_patches, mask_ratio, generator).hidden_BP[0].numpy()
        return drawn

    def _hidden(self, hidden: Any) -> NDArray[np.bool_]:
        """Which patches a caller's mask hides, bool [P]."""
        values, num_patches, size = np.asarray(hidden), self.network.num_patches, self.network.image_size
        side = round(num_patches**0.5)
        if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
            return self._numbered(values)
        if values.dtype == np.bool_ and values.shape == (size, size):
            step = self.network.patch_size
            return np.asarray(values.reshape(side, step, side, step).any(axis=(1, 3)).reshape(-1))
        if values.dtype != np.bool_ or values.shape not in ((num_patches,), (side, side)):
            shapes = f"({num_patches},), ({side}, {side}) or ({size}, {size})"
            raise DataError(f"hidden is {values.dtype} {values.shape}, expected bool {shapes}, or numbers of patches")
        return values.reshape(-1)

    def _numbered(self, numbers: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        num_patches = self.network.num_patches
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < num_patches):
            raise DataError(
                f"hidden names patches from {numbers.min()} to {numbers.max()}; they count from 0 to {num_patches - 1}"
            )
        hidden = np.zeros(num_patches, bool)
        hidden[numbers] = True
        return hidden


def load_trained(folder: Path, *, device: str = "cpu", image_size: int | None = None) -> FedmixModel:
    """The model of an exported folder; RunError that names what is missing or wrong.

    With an ``image_size`` other than its own, pictures are prepared at that size and its patch positions are resampled.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; name one that `fedmix export` wrote")
    if (folder / "model.safetensors").is_file() and not (folder / FILE).is_file():
        raise RunError(f"{folder} does not say how pictures are prepared ({FILE}); load what `fedmix export {folder}` writes")
    network, sizes, tokenizer = load_model(folder)
    preparation = read_preparation(folder)
    if preparation.size != sizes.image_size:
        raise RunError(f"{folder}: {FILE} and config.json are of different models; export the model again")
    if image_size is not None and image_size != sizes.image_size:
        network, sizes, tokenizer = load_model(folder, image_size=image_size)
        preparation = replace(preparation, size=image_size)
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise RunError(f'the model cannot be put on device {device!r} ({type(error).__name__}); "cpu" always works') from None
    return FedmixModel(network, tokenizer, max_words=sizes.max_words, preparation=preparation, trained_on=sizes.trained_on)


def _batches(items: Any, what: str) -> Iterator[tuple[int, Sequence[Any]]]:
    """(number of the first, at most ``BATCH_SIZE`` items); one item that is not in a list would be read letter by letter."""
    is_stack = isinstance(items, np.ndarray) and items.ndim >= 3
    if not is_stack and not isinstance(items, (list, tuple)):
        raise DataError(f"expected a list of {what}, got {_named(items)}; put even a single one in a list")
    for start in range(0, len(items), BATCH_SIZE):
        yield start, items[start : start + BATCH_SIZE]


def _named(value: Any) -> str:
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
