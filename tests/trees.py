"""Miniature data sets with the file names and columns of the real ones, and invented content."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from PIL import Image

from fedmix.data.images import ImageOptions
from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.data.prepare import PrepareOptions, PrepareSummary, prepare
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer

KEY = bytes(range(32))
SIZE = 16


def picture(*, brightness: int = 200, dtype: type = np.uint8, kind: str = "PNG") -> bytes:
    """An image that is dark to the right."""
    columns = np.mgrid[:20, :20][1]
    scale = 1 if dtype is np.uint8 else 200
    buffer = BytesIO()
    Image.fromarray(((brightness - 5 * columns) * scale).astype(dtype)).save(buffer, kind)
    return buffer.getvalue()


def write_table(path: Path, header: Sequence[str] | str, rows: Sequence[Sequence[object]]) -> None:
    """A CSV, packed if its name says so; a header given as text is written as it stands."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if isinstance(header, str):
        text.write(f"{header}\n")
    else:
        writer.writerow(header)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_file(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def prepared(
    layout: str, root: Path, out: str = "shard", *, source: Mapping[str, object] | None = None, **options: object
) -> tuple[PrepareSummary, Shard]:
    """Prepare a tree with a small size and no limit on bad rows, unless told otherwise."""
    given = PrepareOptions(**{"image": ImageOptions(size=SIZE), "max_bad_share": 1.0, **options})
    opened = open_source(layout, root, SourceOptions(**(source or {})))
    goal = root.parent / out
    summary = prepare(opened, goal, options=given, tokenizer=Tokenizer.load(), key=KEY, workers=2)
    return summary, Shard.open(goal)


def texts(shard: Shard, count: int) -> list[list[int] | None]:
    """The token ids of the first studies."""
    return [None if (words := shard.words(number)) is None else words.tolist() for number in range(count)]


def encoded(*reports: str) -> list[list[int]]:
    return Tokenizer.load().encode(list(reports), 128)
