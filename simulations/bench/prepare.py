"""What the walls around DICOM decoders cost, beside the loop that anyone would write without them.

``workers_1``, ``workers_2``: our files per second, from a path to a square, over those of the plain loop: pydicom decodes,
stored values are scaled between their ends, Pillow resizes. It checks nothing, looks at neither tables nor windows and has
no limit on memory or time. Both are warm: imports and the start of workers are not counted. The files are phantoms
enlarged to 2,000 x 2,500 pixels of 12 bits with a detector's noise, a third each uncompressed, JPEG lossless and JPEG 2000.
``workers_2_plain_2``: two workers beside two processes that each run the plain loop on half of the files, which tells what the
walls cost from what a machine loses when two of its processors work at once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import gdcm
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset

from fedmix.data import phantom
from fedmix.data.images import ImageOptions
from fedmix.data.layouts.records import Picture
from fedmix.data.pictures import PictureReader
from fedmix.data.quarantine import RefusedError
from fedmix.data.walls import Walls
from fedmix.errors import RunError
from simulations.bench import Line

ROWS, COLUMNS, BITS = 2500, 2000, 12
NUM_PICTURES = 4  # of each, a file in every compression
REPEATS = 3  # of the plain loop and ours in turn; medians are compared
SIZE = 224
# The slowest to decode first: among so few files, the last would else leave one of two workers waiting for the other.
COMPRESSIONS = (gdcm.TransferSyntax.JPEG2000Lossless, gdcm.TransferSyntax.JPEGLosslessProcess14_1, None)


def speed(
    workers: int, *, num_plain: int = 1, num_pictures: int = NUM_PICTURES, shape: tuple[int, int] = (ROWS, COLUMNS)
) -> Line:
    """Files per second and core, and how that compares with ``num_plain`` processes of the plain loop."""
    options = ImageOptions(size=SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write_files(folder, num_pictures, shape)
        reader = PictureReader(folder, options, frozenset({"unknown"}))
        with Walls(reader, workers=workers) as walls, _plain_loops(folder, names, num_plain) as plain:
            _walled(walls, reader, names[:1] * 8 * workers, workers)  # so many that each worker is started
            times = [(_timed(plain), _timed(partial(_walled, walls, reader, names, workers))) for _ in range(REPEATS)]
    plain_s, ours_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "bench": "prepare",
        "case": f"workers_{workers}" + (f"_plain_{num_plain}" if num_plain > 1 else ""),
        "value": round(len(names) / ours_s / workers, 3),
        "unit": "files/s/core",
        "against": f"{num_plain} plain loop(s) of pydicom and a resize, {len(names) / plain_s:.3f} files/s",
        "ratio": round(plain_s / ours_s, 4),
    }


CASES: dict[str, Callable[[], Line]] = {
    "workers_1": partial(speed, 1),
    "workers_2": partial(speed, 2),
    "workers_2_plain_2": partial(speed, 2, num_plain=2),
}


def write_files(folder: Path, num_pictures: int, shape: tuple[int, int]) -> list[str]:
    """DICOM files of phantoms in every compression; their names."""
    drawn = phantom.generate(num_pictures, look="north", seed=1, size=512, reports=False).images
    assert drawn is not None
    chance, names = np.random.default_rng(0), []
    pictures = [enlarged(picture, shape, chance) for picture in drawn]
    for compression in COMPRESSIONS:
        for number, stored in enumerate(pictures):
            name = f"{number}-{compression or 0}.dcm"
            _write(stored, folder / name)
            if compression is not None:
                _compress(folder / name, compression)
            names.append(name)
    return names


def enlarged(picture: NDArray[np.uint8], shape: tuple[int, int], chance: np.random.Generator) -> NDArray[np.uint16]:
    """A phantom as a detector of ``shape`` rows and columns would store it, 12 bits with noise."""
    smooth = np.asarray(Image.fromarray(picture).convert("F").resize(shape[::-1], Image.Resampling.BICUBIC))
    noisy = smooth * (4000 / 255) + chance.normal(0, 8, shape)
    stored: NDArray[np.uint16] = noisy.clip(0, (1 << BITS) - 1).astype(np.uint16)
    return stored


def _write(stored: NDArray[np.uint16], path: Path) -> None:
    written = Dataset()
    written.file_meta = FileMetaDataset()
    written.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    written.SOPClassUID, written.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, uid.generate_uid()
    written.Modality, written.BurnedInAnnotation, written.PhotometricInterpretation = "DX", "NO", "MONOCHROME2"
    written.SamplesPerPixel, written.PixelRepresentation = 1, 0
    written.Rows, written.Columns = stored.shape
    written.BitsAllocated, written.BitsStored, written.HighBit = 16, BITS, BITS - 1
    written.WindowCenter, written.WindowWidth = 2048, 4096
    written.PixelData = stored.tobytes()
    written["PixelData"].VR = "OW"
    written.save_as(path, enforce_file_format=True)


def _compress(path: Path, compression: int) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    if not reader.Read():
        raise RunError("GDCM cannot read the bench's own file")
    change.SetTransferSyntax(gdcm.TransferSyntax(compression))
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise RunError("GDCM cannot compress the bench's own file")
    writer.SetFile(reader.GetFile())
    writer.SetFileName(str(path))
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise RunError("GDCM cannot write the bench's own file")


@contextmanager
def _plain_loops(folder: Path, names: Sequence[str], num_plain: int) -> Iterator[Callable[[], object]]:
    """What runs the plain loop over all files, warm: here, or shared between processes of its own."""
    if num_plain == 1:
        _plain(folder, names[:1])
        yield partial(_plain, folder, names)
        return
    shares = [names[first::num_plain] for first in range(num_plain)]
    with get_context("forkserver").Pool(num_plain) as pool:
        run = partial(pool.map, partial(_plain, folder), chunksize=1)
        run([names[:1]] * 8 * num_plain)  # so many that each process has its imports behind it
        yield partial(run, shares)


def _plain(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        pixels = dcmread(folder / name).pixel_array
        low, high = float(pixels.min()), float(pixels.max())
        grey = ((pixels - np.float32(low)) * np.float32(255 / (high - low))).astype(np.uint8)
        scale = SIZE / max(grey.shape)
        width, height = (round(side * scale) for side in grey.shape[::-1])
        Image.fromarray(grey).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _walled(walls: Walls[Picture], reader: PictureReader, names: Sequence[str], workers: int) -> None:
    pictures = [Picture((name,), view=None) for name in names]  # so that headers are read too, as for a folder of DICOM
    with ThreadPoolExecutor(workers) as threads:
        for picture, answer in zip(pictures, threads.map(walls.ask, pictures), strict=True):
            if isinstance(answer, RefusedError):
                raise RunError(f"the bench's own file was refused: {answer.code}")
            reader.received(picture, answer)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
