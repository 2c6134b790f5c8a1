"""What `fedmix export` leaves on the disk: all of it or nothing, for other programs too, and nothing that a site would keep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import RunError
from fedmix.evaluation.features import NotEvaluableError
from fedmix.federation.update import digest
from fedmix.model.folder import load_model
from fedmix.report.files import write_json
from fedmix.trained import export as exporting
from fedmix.trained.export import WRITTEN, export

REPORT = {
    "run": {"name": "little", "state": "completed", "rounds": 3},
    "sites": [
        {"name": "north", "stream": "image", "studies": 1200, "examples": 24000, "bytes_up": 1, "bytes_down": 1},
        {"name": "east", "stream": "image", "studies": 300, "examples": 24000, "bytes_up": 1, "bytes_down": 1},
        {"name": "west", "stream": "paired", "studies": 24, "examples": 8, "bytes_up": 1, "bytes_down": 1},
    ],
    "evaluation": {"classification": {"linear_probe": {"macro_auroc": 0.875, "ci95": (0.8125, 0.9375), "num_test": 40}}},
    "privacy": {"mode": "none"},
}


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A run that has ended with a report, and whose sites trained on shards."""
    folder = shutil.copytree(run, tmp_path / "finished")
    nothing = dict.fromkeys(("wall_s", "local_train_s", "aggregate_s", "evaluate_s", "overhead_ratio"))
    report = {
        "schema": 1,
        "baselines": {},
        "communication": {"bytes_up": 1, "bytes_down": 1, "bytes_full_fp32": 1},
        "timing": nothing,
    } | REPORT
    write_json(folder / "report.json", report)
    wanted = yaml.safe_load((folder / "config.yaml").read_text())
    for site in wanted["data"]["sites"]:
        site |= {"phantom": None, "shard": "/secret/mrs-whitcombe/shard"}
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted))
    return folder


def test_the_weights_sizes_and_vocabulary_are_the_runs_to_the_bit(run: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == set(WRITTEN)
    assert digest(load_file(exported / "model.safetensors")) == digest(load_file(run / "model/model.safetensors"))
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (_, sizes, tokenizer), (_, own_sizes, own_tokenizer) = load_model(exported), load_model(run / "model")
    assert (sizes.model, sizes.image_size, sizes.max_words) == (own_sizes.model, 48, 24)
    assert tokenizer.fingerprint == own_tokenizer.fingerprint, "shards of the run must fit the exported model"
    written = json.loads((exported / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("fedmix", ["MixedModel"])
    assert written["fedmix_version"] == "0.1.0"


def test_transformers_reads_the_vocabulary_and_gives_the_ids_that_the_model_knows(exported: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    texts = ["The heart is ENLARGED.", "no effusion", "catheter tip 3 cm above the carina, unchanged. " * 6]
    ours = Tokenizer.load(exported)
    assert theirs(texts, truncation=True)["input_ids"] == ours.encode(texts, 24)
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.cls_token_id) == (0, ours.mask_id, ours.summary_id)
    assert theirs(texts[:2], padding=True)["input_ids"][1][-1] == 0


def test_a_run_folder_is_taken_for_its_model(run: Path, exported: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "deep/er")
    for name in WRITTEN:
        assert (tmp_path / "deep/er" / name).read_bytes() == (exported / name).read_bytes()


def test_the_card_tells_counts_and_numbers_and_no_file_of_a_site(finished: Path, tmp_path: Path) -> None:
    about = export(finished / "model", tmp_path / "out", licence="cc-by-4.0")
    card = (tmp_path / "out/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert yaml.safe_load(front)["library_name"] == "fedmix"
    assert "2 sites with images (1,500 studies) and 1 site with images with their reports (24 studies). 3 rounds." in body
    assert "| north | images | 1,200 | 24,000 |" in body
    assert "0.875 (0.812\N{EN DASH}0.938)" in body
    assert "Not a medical device" in body
    assert "not protected by differential privacy" in body
    assert "synthetic" not in card
    everything = "".join((tmp_path / "out" / name).read_text() for name in WRITTEN if name != "model.safetensors")
    assert "whitcombe" not in everything
    assert str(tmp_path) not in everything
    assert about.preparation_is_assumed
    assert "this is assumed" in body


def test_a_card_without_a_report_says_that_it_knows_nothing(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "Not known: the model was exported from outside a completed run." in card
    assert "trained on drawings" in card
    assert "no licence until" in card


@pytest.mark.parametrize(
    ("said", "written", "is_assumed"),
    [
        ({}, ("pad", "standard"), True),
        ({"normalise": "none"}, ("pad", "none"), True),
        ({"normalise": "none", "fit": "crop"}, ("crop", "none"), False),
    ],
)
def test_how_pictures_were_prepared_is_said_or_assumed_aloud(
    finished: Path, tmp_path: Path, said: dict[str, Any], written: tuple[str, str], is_assumed: bool
) -> None:
    about = export(finished, tmp_path / "out", **said)
    values = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (values["fit"], values["normalise"]) == written
    assert about.preparation_is_assumed == is_assumed


def test_phantoms_are_taken_as_they_are_drawn(exported: Path) -> None:
    values = json.loads((exported / "preprocessor_config.json").read_text())
    assert (values["fit"], values["normalise"], values["size"]) == ("pad", "none", {"height": 48, "width": 48})


# ---- whole or not at all, and never over something else


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_stays_unless_told_to_replace_it(run: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "place/out"
    export(run, out)
    before = contents(out)
    with pytest.raises(RunError, match="is there already; name another folder, or add --replace"):
        export(finished, out)
    assert contents(out) == before
    export(finished, out, replace=True)
    assert "1,200" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "spoil", [lambda out: (out / "thesis.docx").write_text("x"), lambda out: (out / exporting.FILE).unlink()]
)
def test_only_an_exported_model_is_ever_replaced(run: Path, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    export(run, tmp_path / "out")
    spoil(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(RunError, match="holds other things than an exported model, so it is not replaced"):
        export(run, tmp_path / "out", replace=True)
    assert contents(tmp_path / "out") == before


def test_the_runs_own_model_is_not_replaced_by_its_export(run: Path) -> None:
    before = contents(run)
    with pytest.raises(RunError, match="not replaced"):
        export(run, run / "model", replace=True)
    assert contents(run) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_failure_half_way_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    place = tmp_path / "place"
    if is_there:
        export(run, place / "out")
    before = contents(tmp_path)

    def fails(about: object) -> str:
        raise NotEvaluableError("broken")

    monkeypatch.setattr(exporting, "model_card", fails)
    with pytest.raises(NotEvaluableError):
        export(run, place / "out", replace=True)
    assert contents(tmp_path) == before


def test_a_move_that_fails_puts_the_old_folder_back(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, tmp_path / "out")
    before, rename = contents(tmp_path), Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if ".partial." in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="No space"):
        export(run, tmp_path / "out", replace=True)
    assert contents(tmp_path) == before


def test_what_cannot_be_exported_is_said(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is an exported model already"):
        export(exported, tmp_path / "again")
    with pytest.raises(RunError, match=r"config\.json is missing; name RUN/model"):
        export(tmp_path, tmp_path / "again")
    assert not (tmp_path / "again").exists()
