from __future__ import annotations

import base64
import io
import re
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmix.data.quarantine import MENDING, REASONS
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.report.contact_sheet import SIDE, contact_sheet, drawn_squares
from fedmix.report.preview import check_place, look_at, write_preview

VIEWS = ("PA", "AP", "lateral", "unknown")
Make = Callable[..., Shard]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    def make(images: list[bool], texts: list[str | None], name: str = "shard", max_words: int = 16) -> Shard:
        """A shard whose images are darker above and to the left, and a little different in each row."""
        writer = ShardWriter(
            tmp_path / name,
            image_size=SIDE,
            tokenizer=tokenizer,
            key=bytes(32),
            label_names=("<b>Edema", "Hernia"),
            max_words=max_words,
        )
        with writer:
            for row, (has_image, text) in enumerate(zip(images, texts, strict=True)):
                writer.add(
                    patient=f"MUELLER-{row}",
                    study=f"STUDY-{row}",
                    image=upright(row) if has_image else None,
                    text=text,
                    labels={"Hernia": int(row == 0)} if row < 2 else {},
                    view=VIEWS[row % 4],
                )
            writer.quarantine("file_missing", 3)
            writer.quarantine("phi_date", 1200)
        return Shard.open(tmp_path / name)

    return make


def upright(row: int) -> np.ndarray:
    image = np.full((SIDE, SIDE), row, np.uint8)
    image[SIDE // 2 :] += 60
    image[:, SIDE // 2 :] += 30
    return image


# The contact sheet


def test_squares_are_drawn_evenly_from_the_first_image_to_the_last(make: Make) -> None:
    has_image = [row % 3 != 0 for row in range(150)]
    squares = drawn_squares(make(has_image, ["Normal."] * 150))
    places = [sum(has_image[: square.row]) for square in squares]
    assert len(squares) == 48
    assert (places[0], places[-1]) == (0, 99)
    assert {after - before for before, after in pairwise(places)} == {2, 3}
    assert all(has_image[square.row] and square.view == VIEWS[square.row % 4] for square in squares)
    assert squares[0].caption == "row 1 · AP"


def test_a_small_shard_is_shown_whole_and_once(make: Make) -> None:
    assert [square.row for square in drawn_squares(make([True] * 11, [None] * 11))] == list(range(11))


def test_the_sheet_shows_each_image_as_the_shard_holds_it_in_the_order_of_reading(make: Make) -> None:
    shard = make([True] * 20, [None] * 20)
    sheet = np.asarray(contact_sheet(drawn_squares(shard)))
    top_of_row = {row: 12 + row // 8 * (SIDE + 34) for row in range(20)}
    for row in range(20):
        left = 12 + row % 8 * (SIDE + 12)
        np.testing.assert_array_equal(sheet[top_of_row[row] :, left:][:SIDE, :SIDE], shard.image(row))
        assert sheet[top_of_row[row] + SIDE :, left:][:22, :SIDE].max() > 150, "a caption stands under it"


# The page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_one_file_with_every_square_and_no_word_of_the_site(make: Make, tmp_path: Path) -> None:
    text = "Zebra crossing seen by Doctor Quagga."
    shard = make([True] * 9 + [False], [text] * 10)
    source = write_preview(shard, tmp_path / "look").read_text()
    tags = Tags()
    tags.feed(source)
    assert len(tags.sources) == 9
    shown = Image.open(io.BytesIO(base64.b64decode(tags.sources[4].removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(shown), shard.image(4))
    assert not re.search(r"https?://|@import|url\(", source)
    assert not tags.names & {"script", "link", "iframe"}
    assert "default-src 'none'" in source
    assert "&lt;b&gt;Edema" in source
    for word in ("Zebra", "Quagga", "MUELLER", "STUDY-", str(tmp_path), *shard.patient.tolist()):
        assert word.lower() not in source.lower()


def test_the_page_says_what_is_in_the_shard_and_how_to_mend_what_is_not(make: Make) -> None:
    preview = look_at(make([True] * 3 + [False], ["Normal."] * 4))
    assert [(one.name, one.present, one.absent, one.unknown) for one in preview.findings] == [
        ("Hernia", 1, 1, 2),
        ("<b>Edema", 0, 0, 4),
    ]
    assert [(one.code, one.count) for one in preview.left_out] == [("phi_date", 1200), ("file_missing", 3)]
    assert preview.left_out[1].mending == MENDING["file_missing"]
    assert preview.said.views == {"AP": 1, "PA": 1, "lateral": 1}


def test_lengths_are_counted_in_bins_that_hold_every_text(make: Make) -> None:
    texts = ["Normal." * number or None for number in (0, 1, 1, 3, 60)]
    shard = make([True] * 5, texts, max_words=16)
    found = np.diff(shard.offsets)[1:].tolist()
    lengths = look_at(shard).lengths
    assert lengths is not None
    assert max(found) == 16 == lengths.longest
    assert lengths.num_cut == found.count(16) == 1
    assert lengths.median == int(np.median(found))
    for one in lengths.bins:
        assert one.count == sum(one.first <= length <= one.last for length in found)
    assert sum(one.count for one in lengths.bins) == 4
    assert max(one.share for one in lengths.bins) == 1


def test_a_shard_without_images_leaves_no_older_sheet_behind(make: Make, tmp_path: Path) -> None:
    write_preview(make([True], ["Normal."]), tmp_path / "look")
    assert (tmp_path / "look/sheet.png").exists()
    assert stat.S_IMODE((tmp_path / "look").stat().st_mode) == 0o700
    page = write_preview(make([False], ["Normal."], name="texts"), tmp_path / "look").read_text()
    assert "holds no images" in page
    assert [entry.name for entry in (tmp_path / "look").iterdir()] == ["index.html"]
    assert "holds no reports" in write_preview(make([True], [None], name="images"), tmp_path / "look").read_text()


# Where it may lie


def test_a_preview_in_a_shard_is_refused_through_links_too(make: Make, tmp_path: Path) -> None:
    shard = make([True], [None])
    (tmp_path / "door").symlink_to(shard.path)
    for place in (shard.path, shard.path / "a/b", tmp_path / "door/look", tmp_path / "x/../shard/look"):
        with pytest.raises(DataError, match="must not lie in a shard"):
            write_preview(shard, place)
    with pytest.raises(DataError, match="must not lie in a shard"):
        check_place(tmp_path / "coming/look", tmp_path / "coming")
    assert Shard.open(shard.path).fingerprint == shard.fingerprint


def test_a_place_that_cannot_be_written_is_said_without_its_name(make: Make, tmp_path: Path) -> None:
    (tmp_path / "MUELLER").write_text("")
    for place in (tmp_path / "MUELLER", tmp_path / "MUELLER/look"):
        with pytest.raises(DataError) as caught:
            write_preview(make([True], [None], name=f"shard{place.name}"), place)
        assert "MUELLER" not in str(caught.value)


def test_every_reason_has_a_way_to_mend_it() -> None:
    assert list(MENDING) == list(REASONS)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in MENDING.values())
