"""What a walled worker does with a file: open it below the root, decode it, send its square (and its header) as bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmix.data import dicom
from fedmix.data.images import ImageOptions, fit_square, read_image
from fedmix.data.layouts import read_inside
from fedmix.data.quarantine import RefusedError


@dataclass(frozen=True)
class SquareReader:
    """Path below the root -> a square's bytes, for PNG, JPEG and DICOM alike."""

    root: Path
    options: ImageOptions
    gates: dicom.Gates = field(default_factory=dicom.Gates)

    def __call__(self, path: str) -> bytes:
        """What a worker sends for the file."""
        return read_image(read_inside(self.root, path), self.options, gates=self.gates).tobytes()

    def square(self, answer: bytes) -> NDArray[np.uint8]:
        """The square [S, S] that a worker sent. Raises RefusedError if it is none: then the worker is not to be trusted."""
        size = self.options.size
        if len(answer) != size * size:
            raise RefusedError("decoder_crashed")
        return np.frombuffer(answer, np.uint8).reshape(size, size)


@dataclass(frozen=True)
class DicomReader:
    """Path below the root -> a DICOM file's header and, where ``options`` are given, its square; the file is read once."""

    root: Path
    options: ImageOptions | None
    gates: dicom.Gates = field(default_factory=dicom.Gates)

    def __call__(self, path: str) -> bytes:
        """What a worker sends for the file."""
        data = read_inside(self.root, path)
        header = dicom.read_header(data).to_bytes()
        if self.options is None:
            return header + b"\n"
        return header + b"\n" + fit_square(dicom.read_pixels(data, gates=self.gates), self.options).tobytes()

    def parts(self, answer: bytes) -> tuple[dicom.Header, NDArray[np.uint8] | None]:
        """Header and square [S, S] that a worker sent. Raises RefusedError if they are none."""
        head, _, pixels = answer.partition(b"\n")
        try:
            header = dicom.Header.from_bytes(head)
        except (ValueError, AttributeError, TypeError):
            raise RefusedError("decoder_crashed") from None
        if self.options is None:
            return header, None
        return header, SquareReader(self.root, self.options).square(pixels)
