import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from trees import encoded, picture, prepared, texts, write_file

from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.errors import DataError


def document(number: int, *, terms: tuple[str, ...] = ("normal",), images: tuple[str, ...] = (), **sections: str) -> str:
    """A report as the collection has them, with what fedmix reads and some of what it does not."""
    parts = "".join(f'<AbstractText Label="{label.upper()}">{text}</AbstractText>' for label, text in sections.items())
    heads = "".join(f"<major>{term}</major>" for term in terms)
    pictures = "".join(f'<parentImage id="{image}"><caption>PA and Lateral</caption></parentImage>' for image in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="CXR{number}"/>'
        "<MedlineCitation><Article><PubDate><Year>2013</Year></PubDate><AuthorList><LastName>Kohli</LastName></AuthorList>"
        f"<Abstract>{parts}</Abstract></Article></MedlineCitation><MeSH>{heads}<automatic>lung</automatic></MeSH>{pictures}"
        "</eCitation>"
    )


REPORTS = {
    1: document(1, comparison="None.", indication="Positive TB test", findings="Lungs are clear.", impression="Normal XXXX."),
    2: document(2, terms=("Cardiomegaly/mild", "Opacity/lung/base"), findings="", impression="Large heart."),
    10: document(10, terms=("No Indexing",), images=("CXR10_IM-0001-1001", "CXR10_IM-0001-2001"), findings="Caf\u00e9."),
    11: document(11, terms=("Cardiomegaly",), indication="Only why."),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, report in REPORTS.items():
        write_file(tmp_path / "openi/ecgen-radiology" / f"{number}.xml", report)
    return tmp_path / "openi"


def test_reports_come_in_the_order_of_their_numbers_with_findings_and_impression(root: Path) -> None:
    summary, shard = prepared("openi", root)
    assert texts(shard, 3) == encoded("Lungs are clear. Normal XXXX.", "Large heart.", "Café.")
    assert shard.label_names == ("Cardiomegaly", "Opacity")
    assert shard.labels.tolist() == [[0, 0], [1, 1], [-1, -1]]
    assert summary.quarantined == {"no_image_no_text": 1}
    assert shard.manifest.languages == {"en": 3}
    assert any("only reports are used" in note for note in summary.notes)


def test_an_archive_is_read_where_it_lies(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        for number, report in reversed(REPORTS.items()):
            member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
            member.size = len(report.encode())
            archive.addfile(member, io.BytesIO(report.encode()))
        for name in ("../../12.xml", "/ecgen-radiology/13.xml", "ecgen-radiology/notes.xml"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("ecgen-radiology/14.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "packed").mkdir()
    (tmp_path / "NLMCXR_reports.tgz").rename(tmp_path / "packed/NLMCXR_reports.tgz")
    assert prepared("openi", root, "a")[1].fingerprint == prepared("openi", tmp_path / "packed", "b")[1].fingerprint
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == ["NLMCXR_reports.tgz"]


def test_images_have_no_known_view_and_are_taken_only_where_that_is_asked_for(root: Path) -> None:
    for name in ("CXR10_IM-0001-1001", "CXR10_IM-0001-2001"):
        write_file(root / "NLMCXR_png" / f"{name}.png", picture())
    summary, _ = prepared("openi", root, stream="image", views="frontal-or-unknown")
    assert (summary.studies, summary.quarantined) == (2, {"no_image": 3})
    summary, shard = prepared("openi", root, "pairs", stream="paired", views="frontal-or-unknown")
    assert (shard.view, summary.quarantined["image_extra"]) == (["unknown"], 1)
    with pytest.raises(DataError, match="none of the 4 rows can be used"):
        prepared("openi", root, "none", stream="paired")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<eCitation><uId id='CXR3'>", "xml_broken"),
        ("<!DOCTYPE a [<!ENTITY b 'boom'>]><eCitation><uId id='CXR3'/>&b;</eCitation>", "xml_forbidden"),
        ("<!DOCTYPE a SYSTEM 'http://127.0.0.1/a.dtd'><eCitation/>", "xml_forbidden"),
        ("<eCitation>&lol;</eCitation>", "xml_broken"),
        ("<a>" * 5000 + "</a>" * 5000, "patient_missing"),
        ("<?xml version='1.0' encoding='klingon'?><eCitation/>", "xml_broken"),
        ("<eCitation>" + "x" * 2**20 + "</eCitation>", "file_too_large"),
        ("<eCitation/>", "patient_missing"),
        ("<eCitation><uId id='DOE JANE'/></eCitation>", "patient_missing"),
        (document(3, terms=("Seen 12/03/2019",)), "label_unreadable"),
        (document(3, images=("../secret",)), "path_unexpected"),
    ],
)
def test_xml_that_is_damaged_or_means_harm_is_refused(root: Path, text: str, code: str) -> None:
    write_file(root / "ecgen-radiology/3.xml", text)
    summary, _ = prepared("openi", root, stream="text")
    assert summary.quarantined[code] == 1
    assert summary.shown_rows[code] == (3,)


def test_an_encoding_that_the_xml_declares_is_used(root: Path) -> None:
    declared = document(3, findings="Caf\u00e9.").replace("utf-8", "iso-8859-1").encode("latin-1")
    write_file(root / "ecgen-radiology/3.xml", declared)
    _, shard = prepared("openi", root, stream="text")
    assert texts(shard, 3)[2] == encoded("Café.")[0]


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Open-i reports"):
        open_source("openi", tmp_path, SourceOptions())
    write_file(tmp_path / "NLMCXR_reports.tgz", b"\x1f\x8b no archive")
    with pytest.raises(DataError, match="cannot be read to its end"):
        open_source("openi", tmp_path, SourceOptions())


@pytest.mark.data
def test_the_real_archive_prepares_in_under_a_minute(tmp_path: Path) -> None:
    corpus = Path(os.environ.get("FEDMIX_OPEN_DATA") or Path(__file__).parents[3].parent / "shared" / "data" / "cxr-open")
    if not (corpus / "raw/NLMCXR_reports.tgz").is_file():
        pytest.skip("the small real corpus is not here; point FEDMIX_OPEN_DATA at it")
    start = time.monotonic()
    source = tmp_path / "raw"
    source.symlink_to(corpus / "raw")
    summary, shard = prepared("openi", source, max_bad_share=0.02)
    assert time.monotonic() - start < 60
    assert (summary.rows, summary.studies) == (3955, 3927)  # 28 have neither findings nor impression
    assert summary.quarantined == {"no_image_no_text": 28}
    assert shard.manifest.languages == {"en": 3927}
