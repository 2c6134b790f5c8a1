"""Protocols of the literature: what their headers say is what they need, and it runs, on data sets in miniature."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trees import picture, write_file, write_table

from fedmix import cli, config
from fedmix.data.layouts import mimic, nih14
from fedmix.data.shard import Shard
from fedmix.evaluation import exclusive

ROOT = Path(__file__).parents[2]
PROTOCOLS = sorted((ROOT / "configs/protocols").glob("*.yaml"))
SMALL = (
    "data.image_size=32", "data.max_words=24", "data.held_out.probe_studies=20", "data.held_out.also.openi.probe_studies=20",
    "model.patch_size=8", "model.width=16", "model.depth=1", "model.num_heads=2", "model.decoder_width=16",
    "model.decoder_depth=1", "model.decoder_heads=2", "model.embedding=8", "federation.device=cpu",
    "stages.masked.rounds=1", "stages.masked.local_steps=1", "stages.masked.batch_size=4",
    "stages.aligned.rounds=1", "stages.aligned.local_steps=1", "stages.aligned.batch_size=4",
    "evaluation.gallery=20", "evaluation.num_bootstrap=20", "evaluation.regeneration_images=4",
)  # fmt: skip
Study = tuple[int, str, str]  # subject, finding, split


def commands(protocol: Path) -> list[list[str]]:
    """The commands in the head of a protocol, one a line, in their words."""
    lines = [line.removeprefix("#   ") for line in protocol.read_text().splitlines() if line.startswith("#   fedmix ")]
    return [shlex.split(line)[1:] for line in lines]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda path: path.stem)
def test_the_head_of_a_protocol_prepares_every_shard_that_it_names_and_runs_it(protocol: Path) -> None:
    *preparations, run = commands(protocol)
    assert run == ["simulate", str(protocol.relative_to(ROOT))]
    made = {option(command, "--out"): command for command in preparations}
    experiment = config.load(protocol)
    held_out = experiment.data.held_out
    named = {str(path) for studies in (held_out, *held_out.also.values()) for path in studies.shards}
    named |= {str(site.shard) for site in experiment.data.sites}
    assert named == set(made)
    assert [option(made[str(site.shard)], "--stream") for site in experiment.data.sites] == [
        site.stream for site in experiment.data.sites
    ]
    parts = [(made[str(site.shard)][1], option(made[str(site.shard)], "--part")) for site in experiment.data.sites
             if "--part" in made[str(site.shard)]]  # fmt: skip
    assert len(set(parts)) == len(parts), "two sites would hold the same patients"
    assert set(held_out.also) == {"nih14", "openi"}
    assert not held_out.public


def mimic_tree(root: Path) -> None:
    """Ten test studies with each of the five findings alone, and sixty to train on."""
    five = exclusive.FINDINGS
    studies: list[Study] = [(10_000_000 + number, five[number % 5], "test") for number in range(50)]
    studies += [(10_000_100 + number, (*five, "No Finding")[number % 6], "train") for number in range(60)]
    metadata, splits, labels = [], [], []
    for subject, finding, split in studies:
        study, image = subject + 40_000_000, "-".join([f"{subject:08x}"] * 5)
        metadata.append([image, subject, study, "PA", ""])
        splits.append([image, study, subject, split])
        labels.append([subject, study, *("1.0" if name == finding else "" for name in mimic.FINDINGS)])
        folder = root / f"files/p{str(subject)[:2]}/p{subject}/s{study}"
        write_file(folder / f"{image}.jpg", picture(kind="JPEG", brightness=150 + subject % 100))
        text = f" FINDINGS:\n\n Study with {finding.lower()} of kind {subject % 7}.\n"
        write_file(root / f"mimic-cxr-reports/files/p{str(subject)[:2]}/p{subject}/s{study}.txt", text)
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning")
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", columns, metadata)
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", splits)
    write_table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ("subject_id", "study_id", *mimic.FINDINGS), labels)


def nih_tree(root: Path) -> None:
    """Fourteen findings in turn: forty-two images to train on and to validate, twenty-eight to test on."""
    images = [f"{number:08d}_000.png" for number in range(70)]
    rows = [[image, nih14.FINDINGS[number % 14], number, "PA"] for number, image in enumerate(images)]
    write_table(root / "Data_Entry_2017_v2020.csv", ("Image Index", "Finding Labels", "Patient ID", "View Position"), rows)
    for number, image in enumerate(images):
        write_file(root / "images" / image, picture(brightness=150 + number))
    write_file(root / "train_val_list.txt", "\n".join(images[:42]))
    write_file(root / "test_list.txt", "\n".join(images[42:]))


def openi_tree(root: Path) -> None:
    for number in range(1, 51):
        image, head = f"CXR{number}_IM-0001-1001", ("Cardiomegaly/mild", "normal")[number % 2]
        report = (
            f'<eCitation><uId id="CXR{number}"/><Abstract><AbstractText Label="FINDINGS">Heart of kind {number}.</AbstractText>'
            f'</Abstract><MeSH><major>{head}</major></MeSH><parentImage id="{image}"/></eCitation>'
        )
        write_file(root / "ecgen-radiology" / f"{number}.xml", report)
        write_file(root / "NLMCXR_png" / f"{image}.png", picture(brightness=150 + number))


@pytest.fixture
def fedmix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a command of a head below a folder with data sets in miniature; it has to succeed."""
    for name, write in (("mimic-cxr-jpg", mimic_tree), ("nih14", nih_tree), ("openi", openi_tree)):
        write(tmp_path / "data" / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["fedmix", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (0, None)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda path: path.stem)
def test_a_protocol_runs_from_the_files_of_the_data_sets_to_its_report(protocol: Path, fedmix: Callable[..., None]) -> None:
    *preparations, run = commands(protocol)
    for command in preparations:
        fedmix(*command, "--size", "32", "--max-words", "24", "--workers", "1")
    fedmix(*run, "--out", "run", *(word for one in SMALL for word in ("--set", one)))

    sites = config.load(protocol).data.sites
    shards = [Shard.open(site.shard) for site in sites if site.shard is not None]
    trained = [shard.patient[shard.select("train")].tolist() for shard in shards]
    assert all(trained)
    assert sum(map(len, trained)) == len(np.unique(np.concatenate(trained)))

    report = json.loads(Path("run/report.json").read_text())
    for found in (report["evaluation"], *(baseline["evaluation"] for baseline in report["baselines"].values())):
        assert found["retrieval"]["image_to_text"]["num_queries"] == 40
        assert (found["exclusive"]["num_each"], found["exclusive"]["gallery"]) == (10, 50)
        nih, openi = found["also"]["nih14"], found["also"]["openi"]
        for reading in ("linear_probe", "zero_shot"):
            block = nih["classification"][reading]
            assert (set(block["per_label"]), block["num_test"]) == (set(nih14.FINDINGS), 28)
        assert nih["classification"]["zero_shot"]["num_labels_scored"] == 14
        assert "retrieval" in nih["skipped"]
        assert "Cardiomegaly" in openi["classification"]["zero_shot"]["per_label"]
        assert openi["retrieval"]["text_to_image"]["gallery"] == 20
    page = Path("run/report.html").read_text()
    assert all(f'<h3 class="later">{name}</h3>' in page for name in ("nih14", "openi"))
