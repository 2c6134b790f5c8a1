import contextlib
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fedmix.data.images import MAX_PIXELS, ImageOptions, decode_grey, fit_square, read_image, stretch
from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

QUADRANTS = (220, 160, 100, 40)  # top left, top right, bottom left, bottom right: no turn or mirror leaves them in place


def marked(rows=120, columns=160):
    """Grey values with a different level in each quadrant and a slight slope, so that no two turns look alike."""
    grey = np.empty((rows, columns), dtype=np.uint8)
    middle, centre = rows // 2, columns // 2
    for (row, column), level in zip(((0, 0), (0, 1), (1, 0), (1, 1)), QUADRANTS, strict=True):
        grey[row * middle : (row + 1) * middle, column * centre : (column + 1) * centre] = level
    return grey + (np.arange(columns) // 16).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrant_levels(square):
    """Medians of the four quarters of what is not black border."""
    rows, columns = (np.flatnonzero(square.any(axis=axis)) for axis in (1, 0))
    inside = square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    middle, centre = inside.shape[0] // 2, inside.shape[1] // 2
    return [
        float(np.median(part)) for half in (inside[:middle], inside[middle:]) for part in (half[:, :centre], half[:, centre:])
    ]


def assert_upright(square, tolerance=15):
    assert quadrant_levels(square) == pytest.approx(QUADRANTS, abs=tolerance)


def variants():
    grey = Image.fromarray(marked())
    yield "png", encoded(grey)
    yield "jpeg", encoded(grey, "JPEG", quality=90)
    yield "progressive", encoded(grey, "JPEG", quality=90, progressive=True)
    yield "jpeg rgb", encoded(grey.convert("RGB"), "JPEG", quality=90)
    yield "rgb", encoded(grey.convert("RGB"))
    yield "rgba", encoded(grey.convert("RGBA"))
    yield "grey alpha", encoded(grey.convert("LA"))
    yield "palette", encoded(grey.convert("P"))


@pytest.mark.parametrize(("name", "data"), list(variants()), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_every_accepted_format_comes_out_upright_and_unmirrored(name, data, fit):
    square = read_image(data, ImageOptions(size=48, fit=fit))
    assert square.shape == (48, 48)
    assert square.dtype == np.uint8
    assert_upright(square)


def test_sixteen_bits_keep_orientation_and_fill_the_range():
    values = (marked().astype(np.uint16) * 12) + 300  # 12 bits used of 16, as a detector stores them
    square = read_image(encoded(Image.fromarray(values)), ImageOptions(size=48))
    levels = quadrant_levels(square)
    assert levels == sorted(levels, reverse=True)
    assert square.max() == 255
    assert levels[0] > 235
    assert levels[3] < 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(orientation, kind):
    upright = Image.fromarray(marked(120, 160))
    # What a camera held that way stores: the picture on which Pillow's own exif_transpose gives back the upright one.
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    tag = Image.Exif()
    tag[0x0112] = undo
    stored = ImageOps.exif_transpose(Image.open(BytesIO(encoded(upright, "PNG", exif=tag))))
    tag[0x0112] = orientation
    assert_upright(read_image(encoded(stored, kind, exif=tag), ImageOptions(size=64)))


def test_pad_keeps_the_aspect_ratio_between_black_bars():
    square = read_image(encoded(Image.fromarray(marked(50, 200))), ImageOptions(size=64))
    assert not square[:24].any()
    assert not square[40:].any()
    assert square[24:40].all()


def test_edge_border_repeats_the_outermost_pixels():
    square = read_image(encoded(Image.fromarray(marked(50, 200))), ImageOptions(size=64, border="edge"))
    assert np.array_equal(square[0], square[24])
    assert np.array_equal(square[-1], square[39])


def test_crop_takes_the_middle():
    grey = np.full((60, 180), 10, dtype=np.uint8)
    grey[:, 60:120] = marked(60, 60)
    assert_upright(read_image(encoded(Image.fromarray(grey)), ImageOptions(size=60, fit="crop")), tolerance=8)


def test_small_images_are_enlarged_to_the_size():
    assert read_image(encoded(Image.fromarray(marked(20, 20))), ImageOptions(size=64)).all()


def test_fine_stripes_average_out_instead_of_aliasing():
    stripes = np.zeros((512, 512), dtype=np.uint8)
    stripes[:, ::2] = 255
    square = read_image(encoded(Image.fromarray(stripes)), ImageOptions(size=48))
    assert np.abs(square.astype(int) - 127).max() <= 6


def test_a_jpeg_decoded_small_looks_like_one_decoded_whole():
    noise = np.random.default_rng(0).integers(0, 80, (40, 50), dtype=np.uint8)
    grey = marked(640, 800) // 2 + np.kron(noise, np.ones((16, 16), dtype=np.uint8))
    data = encoded(Image.fromarray(grey), "JPEG", quality=95)
    whole, small = decode_grey(data), decode_grey(data, needed=48)
    assert small.size < whole.size / 10
    assert min(small.shape) >= 2 * 48
    difference = fit_square(whole, ImageOptions(size=48)).astype(int) - fit_square(small, ImageOptions(size=48))
    assert np.abs(difference).mean() < 1.5


def test_stretch_agrees_with_numpy_percentiles_and_ignores_outliers():
    values = np.random.default_rng(0).normal(20000, 3000, 40_000).clip(0, 65535).astype(np.uint16)
    values[:20], values[20:40] = 0, 65535
    low, high = np.percentile(values, [0.5, 99.5])
    reference = ((values - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(stretch(values) - reference).max() < 1


def test_stretch_of_a_small_object_on_an_even_ground_uses_the_whole_range():
    values = np.full((100, 100), 7, dtype=np.uint16)
    values[50, 50] = 9000
    assert set(np.unique(stretch(values))) == {0, 255}


@pytest.mark.parametrize(("gain", "offset"), [(0.5, 10), (0.8, 60), (0.3, 120)])
def test_standard_normalisation_takes_out_exposure(gain, offset):
    grey = np.random.default_rng(1).normal(120, 25, (80, 100)).clip(0, 255)
    options = ImageOptions(size=64, normalise="standard")
    plain = fit_square(grey.astype(np.uint8), options)
    exposed = fit_square((grey * gain + offset).clip(0, 255).astype(np.uint8), options)
    content = exposed[exposed.any(axis=1)] / 255
    assert content.mean() == pytest.approx(0.5, abs=0.01)
    assert content.std() == pytest.approx(0.2, abs=0.01)
    assert np.abs(exposed.astype(int) - plain).mean() < 4


def test_standard_normalisation_leaves_the_border_black():
    square = fit_square(marked(50, 200), ImageOptions(size=64, normalise="standard"))
    assert not square[:24].any()


def refused_code(data, size=48):
    with pytest.raises(RefusedError) as caught:
        read_image(data, ImageOptions(size=size))
    return caught.value.code


def png_claiming(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def jpeg_claiming(width, height):
    data = bytearray(encoded(Image.fromarray(marked()), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claim", [png_claiming, jpeg_claiming])
@pytest.mark.parametrize(("width", "height"), [(65_000, 65_000), (8_001, 8_000), (10_000, 9_500)])
def test_a_decompression_bomb_is_refused_on_its_header(claim, width, height):
    assert width * height > MAX_PIXELS
    assert refused_code(claim(width, height)) == "image_too_large"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for end in range(12, int(len(data) * 0.97), len(data) // 40):
        assert refused_code(data[:end]) == "image_broken"


def test_what_is_no_image_we_read_is_refused_by_its_first_bytes():
    grey = Image.fromarray(marked())
    for data in (
        encoded(grey, "GIF"),
        encoded(grey, "TIFF"),
        encoded(grey, "BMP"),
        encoded(grey, "WEBP"),
        b"",
        b"<svg/>",
        b"%!PS",
    ):
        assert refused_code(data) == "image_format"


def test_colours_without_a_grey_meaning_thin_strips_and_blanks_are_refused():
    assert refused_code(encoded(Image.fromarray(marked()).convert("CMYK"), "JPEG")) == "image_mode"
    assert refused_code(encoded(Image.fromarray(marked(8, 400)))) == "image_too_small"
    assert refused_code(encoded(Image.new("L", (64, 64), 90))) == "image_blank"
    assert refused_code(encoded(Image.fromarray(np.full((64, 64), 900, dtype=np.uint16)))) == "image_blank"


ORIGINALS = [data for _, data in variants()]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ORIGINALS), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_gives_an_image_or_a_reason_and_nothing_else(original, changes):
    data = bytearray(original)
    for position, value in changes:
        data[position % len(data)] = value
    with contextlib.suppress(RefusedError):
        assert read_image(bytes(data), ImageOptions(size=32)).shape == (32, 32)


@pytest.mark.parametrize("wrong", [{"size": 4}, {"fit": "squeeze"}, {"border": "white"}, {"normalise": "z"}])
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        ImageOptions(**wrong)
