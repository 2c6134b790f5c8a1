"""Whose data an audit attacks: studies that a model was trained on and studies that it never saw, from prepared shards.

Members are the training split of their shards, which is what a site trains on. Of a shard that is given on both sides the
others are its validation and test split: patients of the same hospital, drawn by the same key, which is the fair comparison.
A shard given for the others alone is taken whole. Other hospitals look different, so an attack may then tell hospitals apart.

Shapes: N studies, M images, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmix.data.shard import Shard
from fedmix.errors import DataError
from fedmix.evaluation.features import Report, random_for


@dataclass(frozen=True)
class Subjects:
    """Studies with their images uint8 [M, S, S], word ids, patients [N], and whether a model was trained on them, bool [N].

    ``image_row``: int64 [N], -1 where a study has no image; ``words``: None where it has no report. ``are_alike``: both sides
    come from the same shards. ``num_shared_patients``: others that were left out because they are members elsewhere.
    """

    images: NDArray[np.uint8] | None
    image_row: NDArray[np.int64]
    words: Sequence[NDArray[np.int64] | None]
    patient: NDArray[Any]
    is_member: NDArray[np.bool_]
    are_alike: bool = True
    num_shared_patients: int = 0

    def __post_init__(self) -> None:
        """Check once, where data enters."""
        lengths = {len(self.image_row), len(self.words), len(self.patient), len(self.is_member)}
        if len(lengths) > 1:
            raise DataError(f"subjects have parts of {sorted(lengths)} studies; give one row for each study")
        for name, side in (("members", self.is_member), ("non-members", ~self.is_member)):
            if not side.any():
                raise DataError(f"there are no {name}; an audit compares studies of the training with studies outside it")
        num_shared = len(np.intersect1d(self.patient[self.is_member], self.patient[~self.is_member]))
        if num_shared:
            raise DataError(f"{num_shared} patients are members and non-members; split by patient")

    def __len__(self) -> int:
        return len(self.patient)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """Bool [N]: studies with an image."""
        return np.asarray(self.image_row >= 0, bool)

    @property
    def has_text(self) -> NDArray[np.bool_]:
        """Bool [N]: studies with a report."""
        return np.array([ids is not None and len(ids) > 0 for ids in self.words], bool)

    def images_of(self, studies: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images uint8 [n, S, S] of studies that have one."""
        assert self.images is not None
        return np.asarray(self.images[self.image_row[studies]])

    def words_of(self, studies: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Word ids of studies that have a report."""
        return [np.asarray(self.words[study], np.int64) for study in studies]

    def counts(self) -> Report:
        """How many studies, patients, images, reports and pairs are on either side."""
        has = {"images": self.has_image, "reports": self.has_text, "pairs": self.has_image & self.has_text}
        sides = {"members": self.is_member, "non_members": ~self.is_member}
        return {
            name: {"studies": int(side.sum()), "patients": len(np.unique(self.patient[side]))}
            | {kind: int((side & present).sum()) for kind, present in has.items()}
            for name, side in sides.items()
        } | {"are_alike": self.are_alike, "num_shared_patients_left_out": self.num_shared_patients}


def of_shards(
    members: Sequence[Shard],
    others: Sequence[Shard],
    *,
    image_size: int,
    tokenizer: str,
    most_patients: int = 2000,
    seed: int = 0,
) -> Subjects:
    """At most ``most_patients`` a side, drawn by the seed with all their studies.

    ``tokenizer``: the fingerprint of the model's. Raises DataError for shards of another tokenizer or image size.
    """
    for shard in (*members, *others):
        _check(shard, image_size, tokenizer)
    trained = [(shard, shard.select("train")) for shard in members]
    theirs = {shard.fingerprint for shard in members}
    outside = [(shard, _outside(shard, is_shared=shard.fingerprint in theirs)) for shard in others]
    member_patients = {name for shard, rows in trained for name in shard.patient[rows].tolist()}
    other_patients = {name for shard, rows in outside for name in shard.patient[rows].tolist()}
    rng = random_for(seed, "audited patients")
    drawn = [_drawn(side, most_patients, rng) for side in (member_patients, other_patients - member_patients)]
    picked = [(shard, rows[np.isin(shard.patient[rows], drawn[0])], True) for shard, rows in trained]
    picked += [(shard, rows[np.isin(shard.patient[rows], drawn[1])], False) for shard, rows in outside]
    return _gathered(
        picked,
        are_alike=theirs == {shard.fingerprint for shard in others},
        num_shared_patients=len(other_patients & member_patients),
    )


def words_trained_on(shards: Sequence[Shard]) -> NDArray[np.int64]:
    """The different word ids in the reports of the shards' training splits."""
    reports = [shard.words(int(row)) for shard in shards for row in shard.select("train")]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(ids for ids in reports if ids is not None)]))


def _outside(shard: Shard, *, is_shared: bool) -> NDArray[np.int64]:
    if not is_shared:
        return np.arange(len(shard))
    return np.concatenate([shard.select("val"), shard.select("test")])


def _drawn(patients: set[str], most: int, rng: np.random.Generator) -> NDArray[np.str_]:
    return rng.permutation(np.array(sorted(patients), np.str_))[:most]


def _check(shard: Shard, image_size: int, tokenizer: str) -> None:
    if shard.has_text.any() and shard.tokenizer_fingerprint != tokenizer:
        raise DataError(
            "an audited shard was prepared with another tokenizer than the model's; prepare it again with the model's"
        )
    if shard.has_image.any() and shard.image_size != image_size:
        raise DataError(
            f"an audited shard has images of {shard.image_size} px, the model wants {image_size}; "
            f"prepare it with --size {image_size}"
        )


def _gathered(
    picked: Sequence[tuple[Shard, NDArray[np.int64], bool]], *, are_alike: bool, num_shared_patients: int
) -> Subjects:
    images: list[NDArray[np.uint8]] = []
    image_row: list[int] = []
    for shard, rows, _ in picked:
        for row in rows:
            image = shard.image(int(row))
            image_row.append(-1 if image is None else len(images))
            images += [] if image is None else [image]
    return Subjects(
        images=np.stack(images) if images else None,
        image_row=np.array(image_row, np.int64),
        words=[shard.words(int(row)) for shard, rows, _ in picked for row in rows],
        patient=np.concatenate([shard.patient[rows] for shard, rows, _ in picked]),
        is_member=np.concatenate([np.full(len(rows), side) for _, rows, side in picked]),
        are_alike=are_alike,
        num_shared_patients=num_shared_patients,
    )
