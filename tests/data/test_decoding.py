"""Pictures of every kind are decoded by workers, never in the process that writes the shard."""

import resource
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from radiographs import file_of, marked

from fedmix.data import dicom
from fedmix.data.images import MAX_PIXELS, ImageOptions, read_image
from fedmix.data.layouts.records import Picture, Source
from fedmix.data.prepare.decoding import decoding
from fedmix.data.prepare.options import PrepareOptions
from fedmix.data.quarantine import RefusedError

OPTIONS = ImageOptions(size=32)


def plain(kind, pixels=None):
    buffer = BytesIO()
    Image.fromarray((marked() >> 4).astype(np.uint8) if pixels is None else pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def decode(tmp_path):
    source = Source(root=tmp_path, num_rows=4, label_names=(), records=lambda: iter(()))
    with decoding(source, PrepareOptions(image=OPTIONS), workers=2) as decode:
        yield decode


def code_of(decode, name):
    with pytest.raises(RefusedError) as caught:
        decode(Picture((name,), view="PA"))
    return caught.value.code


def test_no_picture_of_any_kind_is_decoded_where_the_shard_is_written(tmp_path, monkeypatch, decode):
    files = {"a.png": file_of(marked()), "b.dcm": plain("PNG"), "c.jpg": plain("JPEG")}  # what a file is, no name says
    wanted = {name: read_image(data, OPTIONS) for name, data in files.items()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "d.dcm").write_bytes(file_of(marked(), BurnedInAnnotation="YES"))
    (tmp_path / "e.dcm").write_bytes(b"GIF89a" + bytes(300))

    def never(*_, **__):
        raise AssertionError("decoded in this process")

    monkeypatch.setattr(dicom, "read_pixels", never)  # workers import their own
    for kind in (PngImageFile, JpegImageFile):
        monkeypatch.setattr(kind, "load", never)
    for name, square in wanted.items():
        decoded = decode(Picture((name,), view="PA"))
        assert (decoded.view, decoded.header) == ("PA", None)
        assert np.array_equal(decoded.image, square)
    codes = {name: code_of(decode, name) for name in ("d.dcm", "e.dcm", "f.dcm")}
    assert codes == {"d.dcm": "dicom_burned_in", "e.dcm": "image_format", "f.dcm": "file_missing"}


def bomb(width, height, held):
    """A PNG of few bytes that claims many pixels of 16 bits, all black, and holds so many of its rows."""
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 16, 0, 0, 0, 0))]
    machine, packed = zlib.compressobj(1), b""
    for _ in range(held):
        packed += machine.compress(bytes(1 + 2 * width))
    chunks += [(b"IDAT", packed + machine.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_a_png_bomb_costs_this_process_nothing(tmp_path, decode):
    """As many pixels as are let in, and a row more."""
    side = int(MAX_PIXELS**0.5)
    (tmp_path / "large.png").write_bytes(bomb(side, side, side))
    (tmp_path / "larger.png").write_bytes(bomb(side, side + 1, 1))
    assert (tmp_path / "large.png").stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(decode, "large.png") == "image_blank"
    assert code_of(decode, "larger.png") == "image_too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
