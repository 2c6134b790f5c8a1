"""The studies that a model is judged by: held by the coordinator, of patients that no site trained on.

Shapes: N studies, M images, S pixels a side, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmix.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """The central held-out set: N studies of patients that no site trained on.

    ``images``: uint8 [M, S, S], or None. ``image_row``: int64 [N], the row of ``images`` that belongs to each study,
    -1 where it has none; None says that study i owns row i.
    ``words``: per study its ids with the summary token, None or empty where it has no report; None if no study has one.
    ``labels``: [N, K], 1 present, 0 absent, -1 unknown (bool is accepted), or None.
    ``patient``: [N], any values that tell patients apart. ``is_probe_train``: bool [N], True for the studies that may
    train a probe; the others are the test studies and share no patient with them.
    ``mean_image``: float [S, S] in 0..1, a public mean image (for instance of the probe-train studies), the baseline of
    regeneration; needed where there are images.
    ``groups``: what subgroups are told apart by, such as "view", each with a name [N] for every study, "" where not known.
    """

    images: NDArray[np.uint8] | None
    words: Sequence[NDArray[np.int64] | None] | None
    labels: NDArray[Any] | None
    label_names: tuple[str, ...]
    patient: NDArray[Any]
    is_probe_train: NDArray[np.bool_]
    mean_image: NDArray[Any] | None = None
    image_row: NDArray[np.int64] | None = None
    groups: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check once, where data enters; store labels as int8 and the image rows explicitly."""
        if self.labels is not None:
            object.__setattr__(self, "labels", np.asarray(self.labels).astype(np.int8))
        if self.image_row is None:
            rows = np.full(len(self), -1, np.int64) if self.images is None else np.arange(len(self.images), dtype=np.int64)
            object.__setattr__(self, "image_row", rows)
        self._check_lengths()
        self._check_values()

    def __len__(self) -> int:
        return len(self.patient)

    def _check_lengths(self) -> None:
        parts = {"words": self.words, "labels": self.labels, "is_probe_train": self.is_probe_train, "image_row": self.image_row}
        parts |= {f"groups by {name}": part for name, part in self.groups.items()}
        for name, part in parts.items():
            if part is not None and len(part) != len(self):
                raise DataError(f"held-out {name} has {len(part)} rows, expected one for each of the {len(self)} studies")
        if self.labels is not None and self.labels.shape != (len(self), len(self.label_names)):
            expected = (len(self), len(self.label_names))
            raise DataError(f"held-out labels are {self.labels.shape}, expected {expected}: one column for each label name")

    def _check_values(self) -> None:
        if self.labels is not None and not np.isin(self.labels, (-1, 0, 1)).all():
            raise DataError("held-out labels must be 1 (present), 0 (absent) or -1 (unknown)")
        num_shared = len(np.intersect1d(self.patient[self.is_probe_train], self.patient[~self.is_probe_train]))
        if num_shared:
            raise DataError(
                f"{num_shared} held-out patients are both in the test and in the probe's training; split by patient"
            )
        if self.images is None:
            return
        if self.images.ndim != 3 or self.images.dtype != np.uint8:
            raise DataError(f"held-out images are {self.images.dtype} {self.images.shape}, expected uint8 [rows, size, size]")
        if self.mean_image is None or self.mean_image.shape != self.images.shape[1:] or not 0 <= self.mean_image.max() <= 1:
            raise DataError(f"held-out mean_image must be float {self.images.shape[1:]} in 0..1, the baseline of regeneration")

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """Bool [N]: studies with an image."""
        assert self.image_row is not None  # filled in __post_init__
        return np.asarray(self.image_row >= 0, bool)

    @property
    def has_text(self) -> NDArray[np.bool_]:
        """Bool [N]: studies with a report."""
        if self.words is None:
            return np.zeros(len(self), bool)
        return np.array([ids is not None and len(ids) > 0 for ids in self.words], bool)

    @property
    def has_label(self) -> NDArray[np.bool_]:
        """Bool [N]: studies with at least one known label."""
        if self.labels is None:
            return np.zeros(len(self), bool)
        return np.asarray((self.labels >= 0).any(axis=1), bool)

    def images_of(self, studies: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images uint8 [n, S, S] of studies that have one."""
        assert self.images is not None
        assert self.image_row is not None
        return np.asarray(self.images[self.image_row[studies]])

    def words_of(self, studies: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Word ids of studies that have a report."""
        assert self.words is not None
        return [np.asarray(self.words[study], np.int64) for study in studies]

    def labels_of(self, studies: NDArray[np.int64]) -> NDArray[np.int8]:
        """Labels int8 [n, K] of studies."""
        assert self.labels is not None
        return np.asarray(self.labels[studies])

    def take(self, studies: NDArray[np.int64]) -> HeldOut:
        """The same held-out set with only these studies; images are not copied."""
        assert self.image_row is not None
        return HeldOut(
            images=self.images,
            words=None if self.words is None else [self.words[study] for study in studies],
            labels=None if self.labels is None else self.labels[studies],
            label_names=self.label_names,
            patient=self.patient[studies],
            is_probe_train=self.is_probe_train[studies],
            mean_image=self.mean_image,
            image_row=self.image_row[studies],
            groups={name: part[studies] for name, part in self.groups.items()},
        )
