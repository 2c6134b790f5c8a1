"""What can be said of a site's shards from outside them: are they whole, do they fit together, what do they hold.

Counts only: nothing here reads an image or a text, and what it gives may be shown to a federation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmix.data.deidentification import Deidentification
from fedmix.data.shard import Shard
from fedmix.errors import DataError


@dataclass(frozen=True)
class Declaration:
    """What a site would tell a federation of one shard.

    ``languages``: texts by language, "unknown" for those of which nobody said. ``texts``: whether they were searched for dates,
    numbers and names.
    """

    streams: dict[str, int]
    splits: dict[str, int]
    num_patients: int
    views: dict[str, int]
    positives: dict[str, int]
    languages: dict[str, int]
    image_size: int
    tokenizer: str
    texts: str


def declaration(shard: Shard) -> Declaration:
    """The counts of a shard; ``positives``: studies in which each finding is present."""
    said = shard.manifest.deidentification
    positives = (shard.labels == 1).sum(axis=0).tolist()
    return Declaration(
        streams=dict(shard.manifest.streams),
        splits=dict(shard.manifest.splits),
        num_patients=len(np.unique(shard.patient)),
        views=dict(sorted(Counter(np.asarray(shard.view)[shard.has_image].tolist()).items())),
        positives=dict(zip(shard.label_names, positives, strict=True)),
        languages=_languages(shard),
        image_size=shard.image_size,
        tokenizer=shard.tokenizer_fingerprint,
        texts=said.texts if isinstance(said, Deidentification) else "not stated",
    )


def _languages(shard: Shard) -> dict[str, int]:
    known = dict(shard.manifest.languages)
    unknown = int(shard.has_text.sum()) - sum(known.values())
    return {**known, "unknown": unknown} if unknown else known


def check_together(shards: Sequence[Shard]) -> None:
    """Raise ``DataError`` where shards of one site do not fit together.

    They need one site key (else nobody can tell whose patients they share), one tokenizer, one image size, and no patient in
    two splits: a model would be tested on whom it was trained on.
    """
    marks = {shard.manifest.key_mark for shard in shards} - {""}
    if len(marks) > 1:
        raise DataError(f"these shards were made with {len(marks)} different site keys; prepare them again with one key")
    tokenizers = {shard.tokenizer_fingerprint for shard in shards if shard.manifest.num_words}
    if len(tokenizers) > 1:
        raise DataError(f"these shards were made with {len(tokenizers)} different tokenizers; prepare them again with one")
    sizes = sorted({shard.image_size for shard in shards if shard.manifest.num_images})
    if len(sizes) > 1:
        raise DataError(f"these shards hold images of {' and '.join(map(str, sizes))} pixels; prepare them again with one size")
    astray = patients_in_two_splits(shards)
    if astray:
        raise DataError(
            f"{astray} patients stand in two splits, so a model would be tested on whom it was trained on; prepare the shards "
            "again without splits of their own, so that the site key draws them alike"
        )


def patients_in_two_splits(shards: Sequence[Shard]) -> int:
    """How many patients belong to more than one split of these shards together."""
    splits: dict[str, set[str]] = {}
    for shard in shards:
        for patient, split in zip(shard.patient.tolist(), shard.split, strict=True):
            splits.setdefault(patient, set()).add(split)
    return sum(len(found) > 1 for found in splits.values())


def num_shared(shards: Sequence[Shard]) -> int:
    """How many patients stand in more than one of these shards."""
    return sum(count > 1 for count in Counter(name for shard in shards for name in set(shard.patient.tolist())).values())
