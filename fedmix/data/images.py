"""A PNG, JPEG or DICOM file -> one square of grey values, uint8 [S, S], the way a reader would see it on a screen.

- What a file is, its first bytes say, never its name. DICOM has a package of its own (fedmix.data.dicom).
- Files are opened by Pillow's PNG and JPEG readers themselves, not by ``Image.open``: no other format can be reached, and
  the pixel limit is ours, checked on the header before a pixel is decoded, without Pillow's process-wide setting.
- 16-bit values are stretched between the 0.5th and 99.5th percentile, since the stored range says little about what was
  meant to be seen. 8-bit values are taken as they are, unless ``normalise`` asks otherwise.
- The aspect ratio is kept. Rows and columns are turned only where an EXIF tag says so; nothing is ever mirrored otherwise.

Shapes: H, W source rows and columns, S pixels a side of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

if TYPE_CHECKING:
    from fedmix.data.dicom import Gates

Fit = Literal["pad", "crop"]
Border = Literal["black", "edge"]
Normalise = Literal["none", "standard"]
Picture = Image.Image | NDArray[Any] | bytes

MAX_PIXELS = 64_000_000  # three times the largest chest detector (about 4,000 x 5,000)
MIN_SIDE = 16  # pixels; anything thinner is an icon or a strip, not a radiograph
LOW_PERCENTILE, HIGH_PERCENTILE = 0.5, 99.5
STANDARD_MEAN, STANDARD_STD = 0.5, 0.2  # 0..1 then spans two and a half standard deviations each way

_BLOCK = 1 << 18  # pixels at a time: indices of 8 bytes each stay in the cache, and memory does not grow with the image
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageOptions:
    """How an image becomes a square.

    ``size``: pixels a side. ``fit``: "pad" shows all of the image, "crop" fills the square with its middle.
    ``border``: what surrounds a padded image, black or its own outermost pixels.
    ``normalise``: "standard" moves each image's mean to 0.5 and its standard deviation to 0.2 (values outside 0..1 are cut),
    which takes out exposure and vendor; the border of a padded image is not counted.
    """

    size: int = 224
    fit: Fit = "pad"
    border: Border = "black"
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        if not MIN_SIDE <= self.size <= 4096:
            raise DataError(f"image size is {self.size} pixels; choose one from {MIN_SIDE} to 4096")
        for name, value, known in (
            ("fit", self.fit, ("pad", "crop")),
            ("border", self.border, ("black", "edge")),
            ("normalise", self.normalise, ("none", "standard")),
        ):
            if value not in known:
                raise DataError(f"image option {name} is {value!r}; it is one of {', '.join(known)}")


def read_image(data: bytes, options: ImageOptions, *, gates: Gates | None = None) -> NDArray[np.uint8]:
    """The bytes of a PNG, JPEG or DICOM file -> [S, S]. Raises ``RefusedError`` with the reason code."""
    return fit_square(decode_grey(data, needed=options.size, gates=gates), options)


def decode_grey(data: bytes, *, needed: int | None = None, gates: Gates | None = None) -> NDArray[np.uint8]:
    """Decode to upright grey values [H, W].

    With ``needed``, a JPEG may come back reduced by a power of two while both sides stay at least twice that many pixels:
    its cosine transform gives the smaller image for a fraction of the time. ``gates``: what is let in of DICOM.
    """
    if not _is_plain(data):
        from fedmix.data import dicom  # not above: pydicom takes a moment, and most sites have none of its files

        if dicom.is_dicom(data):
            return dicom.read_pixels(data, gates=gates)
    try:
        image = _open(data)
        _check_size(image)
        if needed is not None and image.mode in ("L", "RGB"):
            image.draft("L", (2 * needed, 2 * needed))  # does nothing to a PNG
        return _upright(image)
    except RefusedError:
        raise
    except MemoryError:
        raise RefusedError("decoder_memory") from None
    except Exception:
        # A damaged file can raise nearly anything inside a decoder, and one file must never stop a site's preparation.
        # Not chained: the decoder's message may quote the file.
        raise RefusedError("image_broken") from None


def _is_plain(data: bytes) -> bool:
    """Whether the first bytes are those of a PNG or JPEG file; a DICOM file's preamble may pretend to be one."""
    return data.startswith((_PNG, _JPEG)) and data[128:132] != b"DICM"


def prepare_image(picture: Picture, options: ImageOptions) -> NDArray[np.uint8]:
    """A picture in a program's hands -> [S, S], as ``read_image`` makes it of the file. DataError where it is none.

    Bytes are a PNG, JPEG or DICOM file. An array is one grey image [H, W]: uint8, uint16 (stretched, as 16-bit files are), or
    floats in 0..1. A large JPEG that Pillow opened is decoded in full, one handed over as bytes as the shards' were.
    """
    if isinstance(picture, bytes):
        return read_image(picture, options)
    if isinstance(picture, Image.Image):
        return fit_square(_grey_picture(picture), options)
    if isinstance(picture, np.ndarray):
        return fit_square(_grey_array(picture), options)
    raise DataError(f"expected a Pillow image, a grey array or a file's bytes, got {type(picture).__name__}; open it first")


def fit_square(grey: NDArray[np.uint8], options: ImageOptions) -> NDArray[np.uint8]:
    """Resize [H, W] keeping its aspect ratio, then pad or crop it to [S, S]."""
    if grey.min() == grey.max():
        raise RefusedError("image_blank")
    image = Image.fromarray(grey)
    content = _resize_inside(image, options.size) if options.fit == "pad" else _resize_middle(image, options.size)
    if options.normalise == "standard":
        content = _standardise(content)
    missing_rows, missing_columns = options.size - content.shape[0], options.size - content.shape[1]
    margins = (
        (missing_rows // 2, missing_rows - missing_rows // 2),
        (missing_columns // 2, missing_columns - missing_columns // 2),
    )
    square: NDArray[np.uint8] = np.pad(content, margins, mode="edge" if options.border == "edge" else "constant")
    return square


def stretch(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """16-bit values -> 0..255, linear between the 0.5th and 99.5th percentile, cut beyond."""
    flat = values.reshape(-1)
    blocks = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    cumulative = np.cumsum(sum(np.bincount(flat[block], minlength=65536) for block in blocks))
    low, high = np.searchsorted(cumulative, np.array([LOW_PERCENTILE, HIGH_PERCENTILE]) / 100 * values.size)
    if low == high:  # nearly all pixels alike: a small object on an even ground
        low, high = values.min(), values.max()
    if low == high:
        raise RefusedError("image_blank")
    table = (np.arange(65536, dtype=np.float64) - low) / (float(high) - float(low))
    shown, grey = np.rint(np.clip(table, 0, 1) * 255).astype(np.uint8), np.empty(flat.size, np.uint8)
    for block in blocks:
        np.take(shown, flat[block], out=grey[block], mode="clip")  # nothing is beyond; the default would copy once more
    return grey.reshape(values.shape)


def _open(data: bytes) -> PngImageFile | JpegImageFile:
    if data.startswith(_PNG):
        return PngImageFile(BytesIO(data))
    if data.startswith(_JPEG):
        return JpegImageFile(BytesIO(data))
    raise RefusedError("image_format")


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise RefusedError("image_too_large")
    if min(image.size) < MIN_SIDE:
        raise RefusedError("image_too_small")


def _upright(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    grey = _to_grey(image)
    return np.asarray(grey if turn is None else grey.transpose(turn))


def _grey_picture(image: Image.Image) -> NDArray[np.uint8]:
    _check_size(image)
    try:
        return _upright(image)
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for a file that ends early
        raise RefusedError("image_broken") from None


def _grey_array(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.ndim != 2:
        raise DataError(f"expected a grey image [H, W], got an array of shape {values.shape}; convert colours to grey first")
    if min(values.shape) < MIN_SIDE:
        raise RefusedError("image_too_small")
    if values.size > MAX_PIXELS:
        raise RefusedError("image_too_large")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return stretch(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"an image array is {values.dtype}, expected uint8, uint16 or floats in 0..1; convert it")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise DataError("an image of floats has values outside 0..1 or not finite; scale it, or hand over uint8")
    grey: NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
    return grey


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        return Image.fromarray(stretch(np.asarray(image).clip(0, 65535).astype(np.uint16)))
    if image.mode in ("1", "L", "RGB"):
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "P", "PA"):
        over_black = Image.new("RGBA", image.size, (0, 0, 0, 255))  # what is transparent was never seen
        return Image.alpha_composite(over_black, image.convert("RGBA")).convert("L")
    raise RefusedError("image_mode")


def _resize_inside(image: Image.Image, size: int) -> NDArray[np.uint8]:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))


def _resize_middle(image: Image.Image, size: int) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


def _standardise(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    values = content.astype(np.float32) / 255
    deviation = float(values.std())
    if deviation == 0:  # a fine pattern can average out to nothing when it is made small
        raise RefusedError("image_blank")
    scaled = (values - values.mean()) / deviation * STANDARD_STD + STANDARD_MEAN
    grey: NDArray[np.uint8] = np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
    return grey
