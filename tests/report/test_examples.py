from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_run import write_examples

from fedmix.errors import RunError
from fedmix.report.examples import MAX_SIDE, load_examples


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def test_pictures_hold_the_arrays_pixels(tmp_path: Path) -> None:
    write_examples(tmp_path)
    examples = load_examples(tmp_path)
    original = np.load(tmp_path / "examples.npz", allow_pickle=False)["original"]
    drawn = np.asarray(opened(examples.regenerations[0][0].address))
    assert np.abs(drawn / 255 - original[0]).max() <= 0.5 / 255 + 1e-6
    assert [picture.caption for picture in examples.regenerations[0]] == [
        "original", "masked", "regenerated", "with its report", "difference",
    ]  # fmt: skip


def test_difference_is_black_where_the_model_was_right(tmp_path: Path) -> None:
    write_examples(tmp_path)
    arrays = dict(np.load(tmp_path / "examples.npz", allow_pickle=False))
    arrays["regenerated"] = arrays["original"].copy()
    arrays["regenerated"][0, 3, 4] = 1 - arrays["original"][0, 3, 4].round()
    np.savez(tmp_path / "examples.npz", **arrays)
    heat = np.asarray(opened(load_examples(tmp_path).regenerations[0][-1].address)).astype(int).sum(axis=-1)
    assert heat.argmax() == 3 * heat.shape[1] + 4
    assert (np.delete(heat.ravel(), heat.argmax()) == heat.min()).all()


@pytest.mark.parametrize("source", ["site", "hospital", None])
def test_pictures_of_a_site_are_never_drawn(tmp_path: Path, source: str | None) -> None:
    write_examples(tmp_path)
    described = json.loads((tmp_path / "examples.json").read_text()) | {"source": source}
    (tmp_path / "examples.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="only from synthetic or public"):
        load_examples(tmp_path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    write_examples(tmp_path)
    np.savez(tmp_path / "examples.npz", original=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RunError, match="could not be read"):
        load_examples(tmp_path)


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    write_examples(tmp_path, size=224, count=2)
    assert opened(load_examples(tmp_path).regenerations[0][0].address).size == (MAX_SIDE, MAX_SIDE)


def test_eight_bit_arrays_and_a_missing_report_column_are_understood(tmp_path: Path) -> None:
    write_examples(tmp_path)
    arrays = dict(np.load(tmp_path / "examples.npz", allow_pickle=False))
    del arrays["regenerated_with_report"]
    eight_bit = {name: (array * 255).round().astype(np.uint8) for name, array in arrays.items()}
    np.savez(tmp_path / "examples.npz", **eight_bit)
    pictures = load_examples(tmp_path).regenerations[0]
    assert len(pictures) == 4
    assert (np.asarray(opened(pictures[0].address)) == eight_bit["original"][0]).all()


def test_retrieval_keeps_order_and_marks(tmp_path: Path) -> None:
    write_examples(tmp_path)
    marks = [[candidate.is_right for candidate in query.candidates] for query in load_examples(tmp_path).retrievals]
    assert marks == [[True, False, False], [False, True, False], [False, False, True]]


def test_an_example_that_points_nowhere_is_an_error(tmp_path: Path) -> None:
    write_examples(tmp_path)
    described = {"source": "phantom", "retrieval": [{"image": 99, "texts": [], "correct": []}]}
    (tmp_path / "examples.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="not kept"):
        load_examples(tmp_path)
