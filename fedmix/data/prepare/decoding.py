"""Where the pictures of a source are decoded: behind walls, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedmix.data.layouts.records import Picture, Source
from fedmix.data.pictures import Decode, Decoded, PictureReader
from fedmix.data.prepare.options import PrepareOptions
from fedmix.data.quarantine import RefusedError


@contextmanager
def decoding(source: Source, options: PrepareOptions, workers: int) -> Iterator[Decode]:
    """How the pictures of a source are decoded, while the block lasts; no worker starts before a file asks for one."""
    if not options.wants_image:
        yield _unasked
        return
    from fedmix.data.dicom import Gates  # not above: reports are prepared without pydicom
    from fedmix.data.walls import Walls

    gates = Gates(secondary_capture=options.takes_captures, unmarked=options.takes_unmarked)
    reader = PictureReader(source.root, options.image, options.views_of(source), gates)
    with Walls(reader, workers=workers) as walls:

        def decode(picture: Picture) -> Decoded:
            answer = walls.ask(picture)
            if isinstance(answer, RefusedError):
                raise answer
            return reader.received(picture, answer)

        yield decode


def _unasked(picture: Picture) -> Decoded:
    raise AssertionError("a shard of texts looks at no picture")
