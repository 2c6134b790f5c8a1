"""The smallest model and studies that can show a claim: 16 patches, 50 words, width 32, two blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmix import config
from fedmix.batch import Batch
from fedmix.model.encoder import MixedModel
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner

IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES, MAX_WORDS, VOCABULARY = 32, 8, 16, 12, 50
SUMMARY, MASK, FIRST_WORD = 2, 4, 5  # ids: 0 padding, 1 unknown, 2 summary, 3 separator, 4 mask, then words
IDS = WordIds(mask_id=MASK, special_ids=tuple(range(FIRST_WORD)))
SIZES = config.Model(width=32, depth=2, num_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2, embedding=16)


def model(seed: int = 0, *, vocabulary: int = VOCABULARY, **sizes: object) -> MixedModel:
    """The tiny model, its parameters drawn from the seed and from nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wanted = SIZES.model_validate(SIZES.model_dump() | sizes)
        return MixedModel(wanted, image_size=IMAGE_SIZE, max_words=MAX_WORDS, vocabulary=vocabulary)


def learner(seed: int = 0, *, sizes: dict[str, Any] | None = None, **objectives: float | str) -> Learner:
    """A learner with the tiny model; objectives that are not named have weight 0."""
    weights: dict[str, Any] = {"mvm": 0.0, "mlm": 0.0, "contrast": 0.0, "match": 0.0} | objectives
    return Learner(model(seed, **(sizes or {})), config.Objectives(**weights), IDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(num: int, seed: int = 0) -> Tensor:
    """Smooth images [num, 32, 32] in 0..1, all different."""
    coarse = torch.rand(num, 1, 5, 5, generator=generator(seed))
    return F.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=True).squeeze(1)


def words(num: int, seed: int = 0, lengths: Sequence[int] | None = None) -> Tensor:
    """Reports [num, L] that start with the summary token; L is the longest of ``lengths``, by default 7, 8, 9, 7 ..."""
    lengths = lengths or [7 + row % 3 for row in range(num)]
    ids = torch.randint(FIRST_WORD, VOCABULARY, (num, max(lengths)), generator=generator(seed + 1000))
    ids[:, 0] = SUMMARY
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return ids


def batch(kinds: str, seed: int = 0, *, patients: Sequence[int] | None = None) -> Batch:
    """Studies in the order of ``kinds``: i an image, t a report, p a pair. Each has a patient of its own unless told."""
    num_images, num_texts = sum(kind in "ip" for kind in kinds), sum(kind in "tp" for kind in kinds)
    return Batch(
        image=images(num_images, seed) if num_images else None,
        text=words(num_texts, seed) if num_texts else None,
        has_image=torch.tensor([kind in "ip" for kind in kinds]),
        has_text=torch.tensor([kind in "tp" for kind in kinds]),
        patient=torch.tensor(patients or range(len(kinds))),
    )


def places(num: int, visible: Sequence[int]) -> Tensor:
    """The same visible places for every study: [num, K]."""
    return torch.tensor(visible).expand(num, -1)


# What a model does in one go, by name; each returns a number that has a gradient everywhere the pass went.
VISIBLE = (0, 3, 5, 6, 11, 14)


def image_pass(net: MixedModel) -> Tensor:
    visible_BK = places(3, VISIBLE)
    return net.decode_patches(net.encode(image_BSS=images(3), visible_BK=visible_BK), visible_BK).square().sum()


def text_pass(net: MixedModel) -> Tensor:
    encoded = net.encode(words_BL=words(3))
    logits_BLV: Tensor = net.word_head(encoded.tokens["text"])
    return logits_BLV.square().sum()


def joint_pass(net: MixedModel) -> Tensor:
    visible_BK = places(3, VISIBLE)
    encoded = net.encode(image_BSS=images(3), visible_BK=visible_BK, words_BL=words(3))
    matched_B = net.match_head(encoded.tokens["image"][:, 0], encoded.tokens["text"][:, 0])
    read = net.word_head(encoded.tokens["text"]).square().sum() + matched_B.square().sum()
    total: Tensor = net.decode_patches(encoded, visible_BK).square().sum() + read
    return total


def image_embedding_pass(net: MixedModel) -> Tensor:
    return net.encode_image(images(3))[:, 0].sum()


def text_embedding_pass(net: MixedModel) -> Tensor:
    return net.encode_text(words(3))[:, 0].sum()


PASSES: dict[str, Callable[[MixedModel], Tensor]] = {
    "image": image_pass,
    "text": text_pass,
    "joint": joint_pass,
    "image_embedding": image_embedding_pass,
    "text_embedding": text_embedding_pass,
}


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def touched(net: nn.Module) -> set[str]:
    """Names of the parameters that a gradient has reached."""
    return {name for name, parameter in net.named_parameters() if parameter.grad is not None}
