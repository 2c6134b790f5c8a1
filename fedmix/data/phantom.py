"""Phantom chest studies with exact labels: images, reports and facts that no patient ever had, in any number.

For tests, demonstrations and method comparisons that need no hospital. Learning on them is measurable in minutes, yet a
linear probe on raw pixels stays well below a trained model, because anatomy varies more than findings show. Everything
follows from (seed, look): studies come in chunks seeded one by one, so ``generate(50)`` is the beginning of
``generate(100)``, images do not depend on whether reports are asked for, and difficulty moves no random draw.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedmix.data.anatomy import Anatomy, Film, sample_anatomy, sample_film, sample_grain
from fedmix.data.findings import LABELS, PREVALENCE, Findings, sample_findings, sample_patients
from fedmix.data.grammar import PROMPTS, Reporter
from fedmix.data.looks import LOOKS, Look
from fedmix.data.radiograph import render
from fedmix.errors import ConfigError

__all__ = ["GENERATOR_VERSION", "LABELS", "LOOKS", "PROMPTS", "Look", "Phantoms", "contact_sheet", "fingerprint", "generate"]

GENERATOR_VERSION = 1  # raise it with every change that moves a pixel or a word: caches hold phantoms under this number
MIN_SIZE, MAX_SIZE = 48, 512
_CHUNK = 64  # studies that share a seed
_BLOCK_PIXELS = 16 * 64 * 64  # pixels drawn at once: a dozen float32 fields of them stay in a core's cache


@dataclass(frozen=True)
class Phantoms:
    """N studies; images and reports are None where they were not asked for."""

    images: NDArray[np.uint8] | None  # [N, S, S]; the patient's right is the image's left
    reports: list[str] | None
    labels: NDArray[np.bool_]  # [N, F] in the order of LABELS, exact
    patient: NDArray[np.int64]  # [N], unique within one call; about one patient in five has two or three studies


def generate(
    num_studies: int,
    *,
    look: str,
    seed: int,
    size: int = 64,
    difficulty: float = 1.0,
    contrast: float = 1.0,
    images: bool = True,
    reports: bool = True,
) -> Phantoms:
    """Generate studies in one look.

    ``size`` is the image side in pixels. ``difficulty`` scales how anatomy varies, and findings fade with its square root;
    ``contrast`` scales how strongly findings show. More of both makes raw pixels worse and learning faster.

    Raises:
        ConfigError: unknown look, or a number out of range.
    """
    _check(num_studies, look, size, difficulty, contrast)
    pixels = np.empty((num_studies, size, size), np.uint8) if images else None
    texts: list[str] | None = [] if reports else None
    labels = np.empty((num_studies, len(LABELS)), np.bool_)
    patient = np.empty(num_studies, np.int64)
    for start in range(0, num_studies, _CHUNK):
        rows = min(_CHUNK, num_studies - start)
        here = slice(start, start + rows)
        chunk = Chunk(look, seed, start // _CHUNK, difficulty, contrast)
        labels[here] = chunk.findings.present[:rows]
        patient[here] = start + chunk.first_row[:rows]
        if pixels is not None:
            chunk.draw(pixels[here])
        if texts is not None:
            texts += chunk.write(rows)
    return Phantoms(images=pixels, reports=texts, labels=labels, patient=patient)


def _check(num_studies: int, look: str, size: int, difficulty: float, contrast: float) -> None:
    if look not in LOOKS:
        near = get_close_matches(look, LOOKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known looks: {', '.join(LOOKS)}"
        raise ConfigError(f"phantom look {look!r} is not known; {hint}")
    if num_studies < 0:
        raise ConfigError(f"number of phantom studies is {num_studies}, expected 0 or more")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(f"phantom image size is {size} px, expected {MIN_SIZE} to {MAX_SIZE}")
    if not 0 < difficulty <= 3:
        raise ConfigError(f"phantom difficulty is {difficulty}, expected above 0 and at most 3; 1.0 is the tested setting")
    if not 0 < contrast <= 3:
        raise ConfigError(f"phantom contrast is {contrast}, expected above 0 and at most 3; 1.0 is the tested setting")


def _seed(look: str, seed: int, chunk: int, purpose: str) -> int:
    """Hash what a random stream is for into its seed, so that streams never meet by counting."""
    return int.from_bytes(hashlib.blake2b(f"{look}/{seed}/{chunk}/{purpose}".encode(), digest_size=16).digest(), "little")


class Chunk:
    """Up to 64 studies that share a seed; the facts are drawn at once, pixels and words when asked for."""

    def __init__(self, look: str, seed: int, index: int, difficulty: float = 1.0, contrast: float = 1.0) -> None:
        self._look = LOOKS[look]
        self._seeds = {purpose: _seed(look, seed, index, purpose) for purpose in ("findings", "anatomy", "grain", "words")}
        self._contrast = 1.7 * contrast / difficulty**0.5
        rng = np.random.default_rng(self._seeds["findings"])
        self.first_row = sample_patients(rng, _CHUNK)  # [64], row of the patient's first study
        self.findings = sample_findings(rng, self.first_row, self._rates())
        rng = np.random.default_rng(self._seeds["anatomy"])
        self.anatomy = sample_anatomy(rng, self.first_row, difficulty)
        self.film = sample_film(rng, _CHUNK, self._look.appearance, difficulty)

    def _rates(self) -> dict[str, float]:
        factors = {label: self._look.prevalence * self._look.emphasis.get(label, 1.0) for label in LABELS}
        return {label: min(1.0, PREVALENCE[label] * factor) for label, factor in factors.items()}

    def draw(self, images: NDArray[np.uint8], findings: Findings | None = None) -> None:
        """Fill ``images`` [N, S, S] with the first N studies, or with what they would look like with other findings."""
        num_studies, size, _ = images.shape
        rng = np.random.default_rng(self._seeds["grain"])
        block = max(1, _BLOCK_PIXELS // size**2)
        for start in range(0, num_studies, block):
            rows = slice(start, min(start + block, num_studies))
            images[rows] = render(
                _take(self.anatomy, rows),
                _take(self.film, rows),
                _take(findings or self.findings, rows),
                sample_grain(rng, rows.stop - rows.start, size),
                contrast=self._contrast,
                blur=self._look.appearance.blur,
            )

    def write(self, num_studies: int) -> list[str]:
        """Write the reports of the first ``num_studies`` studies."""
        reporter = Reporter(self._look.phrasing, random.Random(self._seeds["words"]))
        return [reporter.write(self.findings, row, bool(self.first_row[row] != row)) for row in range(num_studies)]


Record = TypeVar("Record", Anatomy, Film, Findings)


def _take(record: Record, rows: slice) -> Record:
    """Select studies from a record whose every field is an array over studies."""
    arrays: dict[str, Any] = {field.name: getattr(record, field.name)[rows] for field in fields(record)}
    return type(record)(**arrays)


def fingerprint() -> str:
    """Identify this generator in the keys of caches."""
    return f"phantom-{GENERATOR_VERSION}"


def contact_sheet(size: int = 128, seed: int = 0, *, num_columns: int = 8) -> Image.Image:
    """Draw phantoms of every look, one look a row, each with its findings underneath."""
    caption, margin = 58, 64
    sheet = Image.new("L", (margin + num_columns * size, len(LOOKS) * (size + caption)), 255)
    pen = ImageDraw.Draw(sheet)
    for row, look in enumerate(LOOKS):
        phantoms = generate(num_columns, look=look, seed=seed, size=size, reports=False)
        assert phantoms.images is not None
        top = row * (size + caption)
        pen.text((6, top + size // 2), look, fill=0)
        for column, (image, present) in enumerate(zip(phantoms.images, phantoms.labels, strict=True)):
            left = margin + column * size
            sheet.paste(Image.fromarray(image), (left, top))
            names = [label.replace("_", " ") for label, is_present in zip(LABELS, present, strict=True) if is_present]
            pen.multiline_text((left + 3, top + size + 1), "\n".join(names[:4]) or "no finding", fill=0, spacing=1)
    return sheet
