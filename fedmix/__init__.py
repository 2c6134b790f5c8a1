"""Federated pre-training of one image-text transformer over hospitals that hold images, reports, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # ``import fedmix`` stays as light as an empty file
    import os

    from fedmix.trained.model import FedmixModel


def load(path: str | os.PathLike[str], *, device: str = "cpu", image_size: int | None = None) -> FedmixModel:
    """A trained model from the folder that ``fedmix export`` wrote; RunError where that is missing, damaged or another's.

    ``image_size``: pixels a side to prepare pictures at, if not those it was trained on; its patch positions are resampled.
    """
    from pathlib import Path

    from fedmix.trained.model import load_trained

    return load_trained(Path(path), device=device, image_size=image_size)
