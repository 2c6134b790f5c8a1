"""What axe would call a serious fault, asked of every page in the test run itself: no browser, and nothing fetched.

Structure is read from the HTML, contrast is computed from the style sheet's colours for light and dark (WCAG 2.2, 1.4.3 and
1.4.11). axe-core itself cannot judge text in a drawing, so the colours of drawings are checked here alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from synthetic_audit import canaries_and_update, found
from synthetic_run import manifest, write_run
from synthetic_study import LEVELS, write_study

from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.report import html
from fedmix.report.comparison import side_by_side
from fedmix.report.files import read_json, write_json
from fedmix.report.leakage import write_leakage
from fedmix.report.live import LivePage
from fedmix.report.preview import write_preview
from fedmix.report.study import read_study

TEMPLATES = Path(html.__file__).parent / "templates"
STYLE = (TEMPLATES / "style.css").read_text()
VOID = {"meta", "img", "br", "link", "input"}
TEXT_CONTRAST, GRAPHIC_CONTRAST = 4.5, 3.0
GROUNDS = ("paper", "wash", "accent-wash", "bad-wash")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element] = field(default_factory=list)
    words: str = ""

    def text(self) -> str:
        return self.words + "".join(child.text() for child in self.children)

    def ancestors(self) -> list[Element]:
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]


class Tree(HTMLParser):
    """Every element in the order of the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("", {}, None)
        self.elements: list[Element] = []
        self._open = self.root
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self._open)
        self._open.children.append(element)
        self.elements.append(element)
        if tag not in VOID:
            self._open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.tag == tag
        assert self._open.parent is not None
        self._open = self._open.parent

    def handle_data(self, data: str) -> None:
        self._open.words += data

    def of(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]


def report_page(folder: Path) -> str:
    return html.write_report(folder).read_text()


def failed_page(folder: Path) -> str:
    (folder / "report.json").unlink()
    write_json(folder / "manifest.json", manifest("failed", cause="round 9: 0 of 2 replies"))
    return report_page(folder)


def live_page(folder: Path) -> str:
    return LivePage(folder).whole()


def comparison_page(folder: Path) -> str:
    return html.write_comparison(folder / "compare.html", side_by_side([folder, folder])).read_text()


def further_page(folder: Path) -> str:
    values = read_json(folder / "report.json")
    values["evaluation"]["also"] = {name: dict(values["evaluation"]) for name in ("nih14", "openi")}
    write_json(folder / "report.json", values)
    return report_page(folder)


def leakage_page(folder: Path) -> str:
    return write_leakage(folder / "leakage.html", found(**canaries_and_update())).read_text()


def studies_page(folder: Path) -> str:
    """Two studies with the same regimes."""
    levels = {regime: seeds[:2] for regime, seeds in LEVELS.items()}
    study = read_study(write_study(folder / "study", levels))
    named = [replace(study, name=name) for name in ("first", "second")]
    return html.write_study(folder / "study.html", named).read_text()


def preview_page(folder: Path) -> str:
    writer = ShardWriter(folder / "shard", image_size=16, tokenizer=Tokenizer.load(), key=bytes(32), label_names=("Edema",))
    with writer:
        for row in range(3):
            writer.add(
                patient=str(row), study="1", image=np.full((16, 16), row, np.uint8), text="No edema.", labels={"Edema": 0}
            )
        writer.quarantine("file_missing", 3)
    return write_preview(Shard.open(folder / "shard"), folder / "look").read_text()


PAGES = [
    *(report_page, failed_page, further_page, live_page, comparison_page),
    *(leakage_page, preview_page, studies_page),
]


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.__name__)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A page, written once for all the questions that it is asked."""
    write: Callable[[Path], str] = request.param
    return Tree(write(write_run(tmp_path_factory.mktemp("page") / "demo")))


def name_of(element: Element, tree: Tree) -> str:
    """What a screen reader calls it: its label, what it is labelled by, its alternative, or its text."""
    named = element.attributes
    if "aria-labelledby" in named:
        found = [one for one in tree.elements if one.attributes.get("id") == named["aria-labelledby"]]
        return "".join(one.text() for one in found).strip()
    if element.tag == "progress":
        return "".join(one.text() for one in tree.of("label") if one.attributes.get("for") == named.get("id")).strip()
    return (named.get("aria-label") or named.get("alt") or element.text()).strip()


def test_page_has_a_language_a_title_and_may_be_enlarged(tree: Tree) -> None:
    (page,) = tree.of("html")
    assert page.attributes["lang"] == "en"
    (title,) = tree.of("title")[:1]
    assert title.text().strip()
    (viewport,) = [one for one in tree.of("meta") if one.attributes.get("name") == "viewport"]
    assert not re.search("user-scalable|maximum-scale", viewport.attributes["content"])


def test_headings_begin_with_one_h1_and_leave_out_no_level(tree: Tree) -> None:
    levels = [int(one.tag[1]) for one in tree.of("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(one.text().strip() for one in tree.of("h1", "h2", "h3", "h4"))


def test_every_picture_has_words_or_is_hidden(tree: Tree) -> None:
    assert all(one.attributes.get("alt") for one in tree.of("img"))
    for drawing in tree.of("svg"):
        is_described = drawing.attributes.get("role") == "img" and drawing.attributes.get("aria-label")
        assert is_described or drawing.attributes.get("aria-hidden") == "true"


def test_every_header_of_a_table_says_what_it_heads(tree: Tree) -> None:
    assert all(one.attributes.get("scope") in ("col", "row") for one in tree.of("th"))
    for table in tree.of("table"):
        rows = [one for one in tree.of("tr") if table in one.ancestors()]
        assert rows
        assert all(any(cell.tag == "th" for cell in row.children) for row in rows)


def test_what_scrolls_or_takes_the_focus_has_a_name(tree: Tree) -> None:
    scrolling = [one for one in tree.elements if "scroll" in one.attributes.get("class", "").split()]
    assert {id(table) for table in tree.of("table")} <= {id(child) for one in scrolling for child in one.children}
    assert all(one.attributes.get("tabindex") == "0" and one.attributes.get("role") == "region" for one in scrolling)
    controls = [one for one in tree.elements if one.tag in ("a", "summary", "progress") or "tabindex" in one.attributes]
    assert all(name_of(one, tree) for one in controls)


def test_landmarks_are_there_and_told_apart(tree: Tree) -> None:
    assert [len(tree.of(tag)) for tag in ("main", "header", "footer")] == [1, 1, 1]
    regions = [one for one in tree.elements if one.attributes.get("role") == "region" or one.tag in ("nav", "section")]
    names = [name_of(one, tree) for one in regions if {"aria-label", "aria-labelledby"} & one.attributes.keys()]
    assert all(names)
    assert len(set(names)) == len(names)


def test_ids_are_unique_and_what_points_to_one_finds_it(tree: Tree) -> None:
    ids = [one.attributes["id"] for one in tree.elements if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    pointed = [one.attributes[name] for one in tree.elements for name in ("aria-labelledby", "for") if name in one.attributes]
    pointed += [one.attributes["href"].removeprefix("#") for one in tree.of("a")]
    assert set(pointed) <= set(ids)


def test_lists_hold_items_alone(tree: Tree) -> None:
    assert all({child.tag for child in one.children} <= {"li"} for one in tree.of("ul", "ol"))
    assert all({child.tag for child in one.children} <= {"dt", "dd", "div"} for one in tree.of("dl"))


# ---- colours


def colours(scheme: str) -> dict[str, str]:
    """The style sheet's named colours in a scheme; dark ones replace light ones."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    text = light if scheme == "light" else light + dark
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", text))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def used(*properties: str) -> set[str]:
    """The named colours that the style sheet gives to any of these properties."""
    return set(re.findall(rf"(?<![-\w])(?:{'|'.join(properties)}): var\(--([a-z-]+)\)", STYLE))


def test_a_table_that_goes_on_is_shaded_at_its_edge_and_a_long_name_wraps_on_a_phone() -> None:
    scroll = STYLE.split(".scroll {")[1].split("}")[0]
    assert scroll.count("no-repeat local") == scroll.count("no-repeat scroll") == 2
    assert STYLE.count("--shade: ") == 2, "in light and in dark"
    phone, printed = STYLE.split("@media (max-width: 560px)")[1].split("@media print")
    first = re.search(r"th:first-child, .results th:first-child \{(.*?)\}", phone)
    assert first
    assert {"white-space: normal", "overflow-wrap: anywhere", "max-width: 40vw"} <= set(map(str.strip, first[1].split(";")))
    assert "overflow: visible" in printed
    assert "white-space: normal" in printed


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_words_can_be_read_on_every_ground(scheme: str) -> None:
    named = colours(scheme)
    on_drawings = {"image", "text", "paired", "other"} & used("fill")
    words = used("color") | on_drawings | {"accent", "ink", "soft"}
    assert {"ink", "soft", "accent", "good", "bad", "wait", "image", "text", "paired"} <= words
    grounds = {name for name in used("background") if name in GROUNDS}
    assert grounds == set(GROUNDS)
    faults = {
        (word, ground): round(ratio, 2)
        for word in words
        for ground in grounds
        if (ratio := contrast(named[word], named[ground])) < TEXT_CONTRAST
    }
    assert faults == {}


def test_captions_can_be_read_on_the_contact_sheet() -> None:
    """The only colours that no scheme changes: pictures are looked at on a dark ground."""
    own = (TEMPLATES / "preview.html.j2").read_text()
    (ground,) = re.findall(r"background: (#[0-9a-f]{6})", own)
    (words,) = re.findall(r"[{ ]color: (#[0-9a-f]{6})", own)
    assert contrast(words, ground) >= TEXT_CONTRAST


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_line_and_bar_that_says_something_stands_out_from_the_paper(scheme: str) -> None:
    named = colours(scheme)
    drawn = used("stroke", "fill", "background") - {*GROUNDS, "line", "edge"}  # grid lines and frames say nothing
    assert {"accent", "image", "text", "paired", "soft", "bad"} <= drawn
    assert {name: ratio for name in drawn if (ratio := contrast(named[name], named["paper"])) < GRAPHIC_CONTRAST} == {}
