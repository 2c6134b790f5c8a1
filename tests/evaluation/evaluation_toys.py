"""Encoders whose right answers are known in advance, and a held-out set that they can be asked about.

Every study has a code of eight findings, written into the first row of its image and spelled out in its report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedmix.data.reports.labeller import FINDINGS
from fedmix.evaluation.held_out import HeldOut

NUM_LABELS = 8
IMAGE_SIZE, PATCH_SIZE = 24, 8
LABEL_NAMES = FINDINGS[:NUM_LABELS]
PROMPTS = {name: ((f"{name}.",), (f"no {name}.",)) for name in LABEL_NAMES}
SAYINGS = tuple(saying for pair in PROMPTS.values() for side in reversed(pair) for saying in side)


class ToyVocabulary:
    """0 padding, 1 mask, 2 summary, 3 unknown, then whole sentences, "no cardiomegaly.", "cardiomegaly.", "no effusion." ..."""

    vocab_size = 4 + len(SAYINGS)
    mask_id = 1
    special_ids = frozenset(range(4))

    def encode(self, texts: Sequence[str], max_words: int) -> list[list[int]]:
        return [[2, *(self._id(sentence) for sentence in text.split(".")[:-1])][:max_words] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(SAYINGS[number - 4] for number in ids if number not in self.special_ids)

    def _id(self, sentence: str) -> int:
        saying = f"{sentence.strip()}."
        return 4 + SAYINGS.index(saying) if saying in SAYINGS else 3


class OracleEncoder(nn.Module):
    """Reads the code of a study without error from either side; with the image it knows every hidden word."""

    image_size, patch_size = IMAGE_SIZE, PATCH_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = nn.Dropout(0.5)  # evaluation in training mode would be noisy

    def code_of_image(self, image_BSS: Tensor) -> Tensor:
        return (image_BSS[:, 0, :NUM_LABELS] > 0.5).float() * 2 - 1

    def code_of_text(self, words_BL: Tensor) -> Tensor:
        code_BK = torch.zeros(len(words_BL), NUM_LABELS, device=words_BL.device)
        for k in range(NUM_LABELS):
            code_BK[:, k] = (words_BL == 5 + 2 * k).any(dim=1).float() - (words_BL == 4 + 2 * k).any(dim=1).float()
        return code_BK

    def encode_image(self, image_BSS: Tensor) -> Tensor:
        return self.scale * nn.functional.normalize(self.inner(self.code_of_image(image_BSS)), dim=-1)

    def encode_text(self, words_BL: Tensor) -> Tensor:
        return self.scale * nn.functional.normalize(self.inner(self.code_of_text(words_BL)), dim=-1)

    def image_features(self, image_BSS: Tensor) -> Tensor:
        return self.scale * self.inner(self.code_of_image(image_BSS))

    def text_features(self, words_BL: Tensor) -> Tensor:
        return self.scale * self.inner(self.code_of_text(words_BL))

    def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
        assert (hidden_BP.sum(dim=1) == hidden_BP[0].sum()).all()
        return self.scale * image_BSS  # it peeks: a perfect score

    def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
        logits_BLV = torch.zeros(*words_BL.shape, ToyVocabulary.vocab_size) * self.scale
        if image_BSS is not None:
            code_BK = self.code_of_image(image_BSS)
            for k in range(min(NUM_LABELS, words_BL.shape[1] - 1)):  # finding k is word k + 1 of every report
                answer_B = 4 + 2 * k + (code_BK[:, k] > 0).long()
                logits_BLV[torch.arange(len(words_BL)), k + 1, answer_B] = 50.0
        return logits_BLV

    def match_logits(self, image_BSS: Tensor, words_BL: Tensor) -> Tensor:
        agrees_B = (self.code_of_image(image_BSS) == self.code_of_text(words_BL)).all(dim=1)
        return self.scale * (20.0 * agrees_B.float() - 10.0)


class ConstantEncoder(OracleEncoder):
    """Says the same of everything."""

    def code_of_image(self, image_BSS: Tensor) -> Tensor:
        return torch.ones(len(image_BSS), NUM_LABELS)

    def code_of_text(self, words_BL: Tensor) -> Tensor:
        return torch.ones(len(words_BL), NUM_LABELS)

    def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
        return torch.full_like(image_BSS, 0.5)


class DivergedEncoder(OracleEncoder):
    """Its weights have become NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.scale.data.fill_(float("nan"))


def codes(num: int, seed: int = 0) -> np.ndarray:
    """Different codes, bool [num, 8]: at most 256."""
    numbers = np.random.default_rng(seed).permutation(2**NUM_LABELS)[:num]
    return (numbers[:, None] >> np.arange(NUM_LABELS)) % 2 == 1


def draw(code: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images uint8 [N, 24, 24]: a smooth random ramp with the code in the first row."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, IMAGE_SIZE)
    slopes = rng.uniform(20, 100, (len(code), 2, 1, 1))
    images = 30 + slopes[:, 0] * ramp[:, None] + slopes[:, 1] * ramp[None, :]
    images[:, 0, :NUM_LABELS] = np.where(code, 250, 5)
    return images.astype(np.uint8)


def write(code: np.ndarray) -> list[np.ndarray]:
    """Reports: the summary token and one word for each finding."""
    return [np.array([2, *(4 + 2 * np.arange(NUM_LABELS) + row)], np.int64) for row in code]


def held_out(num: int = 160, **changes: object) -> HeldOut:
    """Studies with different codes, two of each patient; the first half trains probes."""
    code = codes(num)
    images = draw(code)
    parts: dict[str, object] = {
        "images": images,
        "words": write(code),
        "labels": code.astype(np.int8),
        "label_names": LABEL_NAMES,
        "patient": np.arange(num) // 2,
        "is_probe_train": np.arange(num) < num // 2,
        "mean_image": (images.mean(axis=0) / 255).astype(np.float32),
        "groups": {"view": np.where(np.arange(num) // 2 % 2 == 0, "AP", "PA")},
    }
    return HeldOut(**(parts | changes))
