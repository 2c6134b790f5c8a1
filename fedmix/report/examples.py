"""Example pictures of a run, as PNG inside data addresses: what the model redraws and which reports it finds.

Drawn only when evaluation/examples.json says that they are phantoms or public: a site's picture or words never get here.
Arrays are read without pickle. Shapes: K examples, Q queries, S pixels a side.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmix.errors import RunError
from fedmix.report.files import read_json

SHOWABLE = {"phantom": "synthetic phantoms", "public": "public studies"}
MAX_SIDE = 160  # pixels; larger pictures are reduced, or a page of 224-pixel examples would pass 3 MB
MAX_REGENERATIONS = 6
MAX_RETRIEVALS = 6
MAX_TEXT = 600  # characters of a report

Greys = NDArray[np.float32]
# Black to pale yellow through violet and orange, at equal steps (the colours of matplotlib's inferno).
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)


@dataclass(frozen=True)
class Picture:
    """One image: its address (data:image/png), what it shows, and the caption under it."""

    address: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Candidate:
    """A report that the model ranked high, and whether it is the right one."""

    text: str
    is_right: bool


@dataclass(frozen=True)
class Retrieval:
    """A query image, the reports found for it, best first, and its own report."""

    picture: Picture
    candidates: tuple[Candidate, ...]
    truth: str


@dataclass(frozen=True)
class Examples:
    """What may be shown of a run, and where it came from."""

    source: str
    regenerations: tuple[tuple[Picture, ...], ...] = ()
    retrievals: tuple[Retrieval, ...] = ()
    largest_difference: float = 0.0  # grey levels from 0 to 1 at the bright end of the difference pictures


def load_examples(folder: Path) -> Examples:
    """The examples under ``RUN/evaluation``; raises RunError with a sentence fit for the report where none may be shown."""
    described = read_json(folder / "examples.json")
    if not isinstance(described, Mapping):
        raise RunError("This run kept no example pictures.")
    source = described.get("source")
    if source not in SHOWABLE:
        raise RunError("Example pictures are drawn only from synthetic or public studies; this run's are not marked as such.")
    arrays = _read_arrays(folder / "examples.npz")
    regenerations, largest = _regenerations(arrays)
    retrievals = tuple(_retrieval(arrays, item) for item in _items(described)[:MAX_RETRIEVALS])
    return Examples(SHOWABLE[source], regenerations, retrievals, largest)


def _read_arrays(path: Path) -> dict[str, Greys]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: _greys(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise RunError("This run kept no example pictures.") from None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RunError(f"The example pictures could not be read ({type(error).__name__}).") from None
    return {name: array for name, array in arrays.items() if array.ndim == 3}


def _greys(array: NDArray[Any]) -> Greys:
    """Grey values in 0..1, whatever they were stored as; what is not a number is drawn black."""
    scaled = array.astype(np.float32) / (255.0 if array.dtype == np.uint8 else 1.0)
    greys: Greys = np.nan_to_num(scaled).clip(0.0, 1.0)
    return greys


def _regenerations(arrays: Mapping[str, Greys]) -> tuple[tuple[tuple[Picture, ...], ...], float]:
    """Rows of pictures, and the grey difference that the brightest colour stands for."""
    titles = {
        "original": "original",
        "masked": "masked",
        "regenerated": "regenerated",
        "regenerated_with_report": "with its report",
    }
    present = {name: arrays[name][:MAX_REGENERATIONS] for name in titles if name in arrays}
    if not {"original", "regenerated"} <= present.keys() or len({array.shape for array in present.values()}) != 1:
        return (), 0.0
    difference = np.abs(present["original"] - present["regenerated"])
    largest = max(float(difference.max(initial=0.0)), 0.05)
    rows = []
    for number in range(len(difference)):
        pictures = [
            _picture(array[number], f"example {number + 1}, {titles[name]}", titles[name]) for name, array in present.items()
        ]
        heat = _heat(difference[number] / largest)
        pictures.append(
            Picture(_png(heat), f"example {number + 1}, absolute difference of regenerated and original", "difference")
        )
        rows.append(tuple(pictures))
    return tuple(rows), largest


def _items(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    items = described.get("retrieval")
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


def _retrieval(arrays: Mapping[str, Greys], item: Mapping[str, Any]) -> Retrieval:
    images, index = arrays.get("retrieval_image"), item.get("image")
    if images is None or not isinstance(index, int) or not 0 <= index < len(images):
        raise RunError("The retrieval examples point to a picture that was not kept.")
    texts, rights = item.get("texts") or [], item.get("correct") or []
    candidates = tuple(Candidate(_cut(str(text)), bool(right)) for text, right in zip(texts, rights, strict=False))
    return Retrieval(_picture(images[index], f"query image {index + 1}"), candidates, _cut(str(item.get("truth") or "")))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _picture(greys_SS: Greys, alt: str, caption: str = "") -> Picture:
    return Picture(_png(Image.fromarray((greys_SS * 255).round().astype(np.uint8))), alt, caption)


def _heat(share_SS: Greys) -> Image.Image:
    """Shares from 0 to 1 as colours, interpolated between the anchors of HEAT."""
    anchors = np.linspace(0.0, 1.0, len(HEAT))
    channels = [np.interp(share_SS, anchors, HEAT[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _png(image: Image.Image) -> str:
    """The image as a data address."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
