"""Squares of a shard side by side, for a person who sees at a glance what is sideways, inverted or cut off.

Pixels are shown as the shard holds them, black as 0 and white as 255; under each its row in the shard and its view, and
nothing else: neither a hash nor a file's name. These are patients' images: whoever calls this keeps them at the site.
Shapes: S pixels a side.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fedmix.data.shard import Shard

NUM_COLUMNS, NUM_ROWS = 8, 6
SIDE = 160  # pixels of a square on the sheet
_GAP, _CAPTION = 12, 22
_GROUND, _INK = 58, 225  # a grey that neither a black pad nor a white one melts into


@dataclass(frozen=True)
class Square:
    """One image of a shard; ``row`` counts the shard's studies from 0."""

    row: int
    view: str
    image: Image.Image

    @property
    def caption(self) -> str:
        """What stands under it."""
        return f"row {self.row} · {self.view}"

    @property
    def address(self) -> str:
        """The picture as a data address."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def drawn_squares(shard: Shard, count: int = NUM_COLUMNS * NUM_ROWS) -> list[Square]:
    """At most ``count`` squares, evenly from the first image of the shard to its last, in the shard's order."""
    with_image = np.flatnonzero(shard.has_image)
    if not len(with_image):
        return []
    # A large number of images in the order of files or dates: even steps show each part of it.
    places = np.linspace(0, len(with_image) - 1, min(count, len(with_image))).round().astype(np.int64)
    return [_square(shard, int(row)) for row in with_image[places]]


def _square(shard: Shard, row: int) -> Square:
    image_SS = shard.image(row)
    assert image_SS is not None, "only rows with an image are asked for"
    return Square(row, shard.view[row], _resized(image_SS))


def _resized(image_SS: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image_SS).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def contact_sheet(squares: Sequence[Square]) -> Image.Image:
    """The squares in rows of eight, each with its caption underneath."""
    num_columns = min(NUM_COLUMNS, len(squares))
    num_rows = -(-len(squares) // NUM_COLUMNS)
    step = (SIDE + _GAP, SIDE + _CAPTION + _GAP)
    sheet = Image.new("L", (num_columns * step[0] + _GAP, num_rows * step[1] + _GAP), _GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, square in enumerate(squares):
        left, top = (_GAP + number % NUM_COLUMNS * step[0], _GAP + number // NUM_COLUMNS * step[1])
        sheet.paste(square.image, (left, top))
        pen.text((left + SIDE // 2, top + SIDE + 3), square.caption, fill=_INK, font=font, anchor="ma")
    return sheet
