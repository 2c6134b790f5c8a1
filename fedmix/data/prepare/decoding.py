"""Where the pictures of a source are decoded: in this process, or behind walls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from fedmix.data.layouts.records import Picture, Source
from fedmix.data.pictures import Decode, Decoded, NeedsWallsError, PictureReader
from fedmix.data.prepare.options import PrepareOptions
from fedmix.data.quarantine import RefusedError


@contextmanager
def decoding(source: Source, options: PrepareOptions, workers: int) -> Iterator[Decode]:
    """How the pictures of a source are decoded, while the block lasts: what is DICOM, by a worker behind walls."""
    reader = PictureReader(source.root, options.image, options.views_of(source))
    if not options.wants_image:
        yield reader.read
        return
    # Not above: reports and plain images are prepared without pydicom, and no worker starts before a file asks for one.
    from fedmix.data.dicom import Gates
    from fedmix.data.walls import Walls

    reader = replace(reader, gates=Gates(secondary_capture=options.takes_captures, unmarked=options.takes_unmarked))
    with Walls(reader, workers=workers) as walls:

        def decode(picture: Picture) -> Decoded:
            if not source.is_dicom:
                with suppress(NeedsWallsError):
                    return reader.read(picture, is_walled=False)
            answer = walls.ask(picture)
            if isinstance(answer, RefusedError):
                raise answer
            return reader.received(picture, answer)

        yield decode
