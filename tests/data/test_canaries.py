"""A thousand planted identifiers, in every place a hospital's files have for them; none may be seen again."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import radiographs
from PIL import Image
from rich.console import Console

from fedmix.commands.prepare import _summary_table
from fedmix.data.images import ImageOptions
from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.data.prepare import PrepareOptions, prepare
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))
PIXELS = radiographs.marked(20, 20)
# Every text tag that a header may carry, besides those that fedmix reads.
TAGS = (
    *("PatientName", "PatientBirthName", "PatientAddress", "PatientTelephoneNumbers", "PatientMotherBirthName"),
    *("OtherPatientNames", "MilitaryRank", "Occupation", "AdditionalPatientHistory", "PatientComments", "StudyDescription"),
    *("SeriesDescription", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "ProtocolName"),
    *("RequestedProcedureDescription", "RequestingPhysician", "ImageComments", "DeviceSerialNumber", "StudyID"),
)


class Canaries:
    """Names that nothing else in a shard could hold by chance, and a count of them."""

    def __init__(self) -> None:
        self._chance = random.Random(16)
        self.names: list[str] = []

    def __call__(self, kind: str = "") -> str:
        name = "ZQ" + "".join(self._chance.choices("BCDFGHJKLMNPQRSTVWXZ", k=8))
        self.names.append(name)
        return f"{kind}{name}"

    def seen_in(self, data: bytes | str) -> int:
        """How many are in some bytes; how their letters are written makes no difference."""
        text = (data.decode("latin-1") if isinstance(data, bytes) else data).upper()
        return sum(name in text for name in self.names)


def dicom_tree(root: Path, canary: Canaries) -> SourceOptions:
    """DICOM files with canaries in their tags, names and folders, some of them damaged; a table with canaries in all cells."""
    lines = [f"AccessionNumber,report,{canary()}"]
    for number in range(25):
        tags: dict[str, Any] = {tag: canary() for tag in TAGS}
        identifiers = {"PatientID": canary(), "AccessionNumber": canary("A")}
        data = radiographs.file_of(PIXELS, StudyInstanceUID=f"1.2.{number}", **identifiers, **tags)
        folder = root / canary("study ")
        folder.mkdir(parents=True)
        (folder / f"{canary()}.dcm").write_bytes(data[:-50] if number % 5 == 4 else data)
        lines.append(f"{identifiers['AccessionNumber']},seen by Dr. {canary()} on 12/03/2019,{canary()}")
    (root / f"{canary()}.txt").write_text(canary())
    (root.parent / "reports.csv").write_text("\n".join(lines))
    return SourceOptions(reports=root.parent / "reports.csv")


def table_tree(root: Path, canary: Canaries) -> SourceOptions:
    """A table with canaries in its header, its cells and the names of its files, broken in every second row."""
    root.mkdir()
    lines = [f"image,text,patient_id,study_id,labels,view,split,lang,{canary()},sex,age"]
    for number in range(30):
        name = f"{canary()}.png"
        Image.fromarray((PIXELS >> 4).astype(np.uint8)).save(root / name)
        cells = [name, f"{canary()} is well.", canary(), canary(), "Edema", canary(), "train", *(canary() for _ in range(4))]
        broken = {1: (0, f"../{canary()}"), 3: (1, f"tel. 555-1234 {canary()}"), 5: (6, canary()), 7: (4, f"Dr. {canary()}")}
        if number % 8 in broken:
            place, cell = broken[number % 8]
            cells[place] = cell
        lines.append(",".join(cells))
    lines += [f'"{canary()}', f"{canary()},{canary()}"]
    (root / "table.csv").write_text("\n".join(lines))
    return SourceOptions()


def padchest_tree(root: Path, canary: Canaries) -> SourceOptions:
    """PadChest's table with canaries, and findings that are none."""
    root.mkdir()
    names = "ImageID,ImageDir,StudyID,PatientID,Projection,PhotometricInterpretation_DICOM,Report,Labels"
    lines = [f",{names},PatientBirth,PatientSex_DICOM"]
    for number in range(20):
        Image.fromarray((PIXELS >> 4).astype(np.uint8)).save(root / f"{canary()}.png")
        label = "['normal']" if number % 2 else f"\"['{canary('dr. ')}']\""
        image = f"{canary.names[-1 - (number % 2 == 0)]}.png"
        lines.append(
            f"0,{image},0,{canary()},{canary()},PA,MONOCHROME2,{canary('sin hallazgos ')},{label},{canary()},{canary()}"
        )
    (root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv").write_text("\n".join(lines))
    return SourceOptions()


TREES: dict[str, Callable[[Path, Canaries], SourceOptions]] = {
    "dicom": dicom_tree,
    "table": table_tree,
    "padchest": padchest_tree,
}


def everything_written(shard: Path) -> bytes:
    """Names and contents of a shard's files."""
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(shard.rglob("*")) if path.is_file())


def test_a_thousand_canaries_are_nowhere_in_shard_summary_log_or_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    canary, tokenizer = Canaries(), Tokenizer.load()
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    searched: set[str] = set()
    for layout, plant in TREES.items():
        root, out = tmp_path / layout, tmp_path / f"{layout}-shard"
        source = open_source(layout, root, plant(root, canary))
        for phi in ("quarantine", "count"):
            options = PrepareOptions(
                image=ImageOptions(size=16),
                max_bad_share=1.0,
                views="all",
                phi=phi,
                stream="paired",
                replace=True,
                keeps_characteristics=True,
            )
            try:
                summary = prepare(source, out, options=options, tokenizer=tokenizer, key=KEY, workers=2)
            except DataError as error:  # where every text names someone, nothing is left
                said.append(repr(error))
                continue
            console = Console(width=200, record=True, file=StringIO())
            console.print(_summary_table(summary, Path("shard")))
            said += [repr(summary), console.export_text(), repr(Shard.open(out).manifest)]
            assert canary.seen_in(everything_written(out)) == 0
            searched.add(layout)
        with pytest.raises(DataError) as caught:
            prepare(
                source,
                tmp_path / "none",
                options=PrepareOptions(image=ImageOptions(size=16), max_bad_share=0.0, views="all"),
                tokenizer=tokenizer,
                key=KEY,
            )
        said.append(repr(caught.value) + repr(caught.value.__cause__))
    output = capfd.readouterr()
    assert len(set(canary.names)) >= 1000
    assert canary.seen_in("".join(said) + caplog.text + output.out + output.err) == 0
    assert len(said) >= 12
    assert searched == set(TREES)
    assert canary.seen_in(f"the search itself works: {canary.names[0].lower()}") == 1


def test_tokens_of_a_quarantined_text_are_not_in_the_shard(tmp_path: Path) -> None:
    canary, tokenizer = Canaries(), Tokenizer.load()
    root = tmp_path / "table"
    options = table_tree(root, canary)
    given = PrepareOptions(stream="text", max_bad_share=1.0)
    prepare(open_source("table", root, options), tmp_path / "s", options=given, tokenizer=tokenizer, key=KEY)
    shard = Shard.open(tmp_path / "s")
    phone = tokenizer.encode(["555-1234"], 16)[0][1:-1]
    numbers = " ".join(map(str, shard.tokens.tolist()))
    assert shard.num_studies
    assert not re.search(rf"\b{' '.join(map(str, phone))}\b", numbers)
