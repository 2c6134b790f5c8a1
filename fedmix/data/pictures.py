"""One image file -> one square, in a worker process with limits (``fedmix.data.walls``).

What decodes PNG, JPEG and DICOM is C code on bytes that anyone may have written, so none of it runs where the shard is
written. This module imports no more than a worker needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmix.data.images import ImageOptions, decode_grey, fit_square
from fedmix.data.layouts.paths import read_first
from fedmix.data.layouts.records import Picture
from fedmix.data.quarantine import RefusedError

if TYPE_CHECKING:
    from fedmix.data.dicom import Gates, Header

_VIEW_CODES = {"lateral": "view_lateral", "unknown": "view_unknown"}


class Decoded(NamedTuple):
    """A square [S, S], the view it shows, and what its file says of itself if that had to be asked."""

    image: NDArray[np.uint8]
    view: str
    header: Header | None


Decode = Callable[[Picture], Decoded]


@dataclass(frozen=True)
class PictureReader:
    """Reads the pictures of one source; called with a picture it gives bytes, to be sent from a worker."""

    root: Path
    options: ImageOptions
    views: frozenset[str]
    gates: Gates | None = None

    def read(self, picture: Picture) -> Decoded:
        """Open, check and decode. Raises ``RefusedError``."""
        check_view(picture.view, self.views)
        data = read_first(self.root, picture.places)
        if picture.view is not None:
            return Decoded(self._square(data, picture), picture.view, None)
        from fedmix.data import dicom

        if not dicom.is_dicom(data):
            raise RefusedError("not_dicom")
        header = dicom.read_header(data)
        check_view(dicom.view_of(header), self.views)
        return Decoded(self._square(data, picture), dicom.view_of(header), header)

    def __call__(self, picture: Picture) -> bytes:
        """The header as a line (blank where it was not asked for), then the pixels."""
        image, _, header = self.read(picture)
        return (b"" if header is None else header.to_bytes()) + b"\n" + image.tobytes()

    def received(self, picture: Picture, answer: bytes) -> Decoded:
        """What a worker sent. Raises ``RefusedError`` if it is not what was asked for: then it is not to be trusted."""
        head, _, pixels = answer.partition(b"\n")
        size = self.options.size
        if len(pixels) != size * size or bool(head) == (picture.view is not None):
            raise RefusedError("decoder_crashed")
        image = np.frombuffer(pixels, np.uint8).reshape(size, size)
        if picture.view is not None:
            return Decoded(image, picture.view, None)
        from fedmix.data import dicom

        try:
            header = dicom.Header.from_bytes(head)
        except (ValueError, AttributeError, TypeError):
            raise RefusedError("decoder_crashed") from None
        return Decoded(image, dicom.view_of(header), header)

    def _square(self, data: bytes, picture: Picture) -> NDArray[np.uint8]:
        grey = decode_grey(data, needed=self.options.size, gates=self.gates)
        return fit_square(255 - grey if picture.is_negative else grey, self.options)


def check_view(view: str | None, taken: frozenset[str]) -> None:
    """Raise ``RefusedError`` for a view that is not wanted; None, not known yet, passes."""
    if view is not None and view not in taken:
        raise RefusedError(_VIEW_CODES[view])
