"""The command line: help that shows an example, and failures that are one sentence on stderr and an exit code.

Most run in this process, because importing everything takes seconds; tests/simulations/test_failures.py runs real ones.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from little import ROOT, World, everyone, fedmix, values, write_config
from PIL import Image
from safetensors.torch import save_file
from timm.models import VisionTransformer

from fedmix import cli, config
from fedmix.commands.prepare import LayoutChoice
from fedmix.data.layouts.registry import LAYOUTS
from server.model_folder import save_model
from server.store import RunStore
from simulations.bench.cases import BENCHES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmix", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return call


def sentence(answer: tuple[int, str, str]) -> str:
    """The one sentence on stderr that a failed command leaves."""
    code, _, err = answer
    assert code == 1
    assert err.startswith("fedmix: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.removeprefix("fedmix: ").rstrip("\n")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group of commands."""
    yield path
    for name, inner in getattr(group, "commands", {}).items():
        yield from commands(inner, (*path, name))


ALL = list(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "fedmix")
def test_every_command_has_help_with_an_example(path: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*path, "--help")
    assert code == 0
    assert err == ""
    assert f"fedmix {' '.join(path)}".strip() in out.replace("Usage:", "")
    assert "Example:" in out or "Start with:" in out


def test_the_commands_of_the_design_are_there() -> None:
    assert {
        ("simulate",),
        ("prepare",),
        ("shard", "check"),
        ("shard", "preview"),
        ("evaluate",),
        ("audit",),
        ("report",),
        ("compare",),
        ("bench",),
        ("export",),
    } <= set(ALL)


def test_help_comes_without_importing_the_heavy_rooms() -> None:
    program = (
        "import sys; sys.argv = ['fedmix', 'simulate', '--help']\n"
        "from fedmix import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'flwr', 'sklearn', 'pandas', 'transformers'}))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [("simulate",), ("simulate", "a.yaml", "--no-such-option"), ("nosuchcommand",)])
def test_a_command_given_wrongly_is_explained_with_code_2(arguments: tuple[str, ...], run: Run) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err
    assert "Traceback" not in err


# ---- export


def test_a_run_is_exported_and_what_was_assumed_is_said(run: Run, tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path))
    save_model(tmp_path / "a-run/model", world.experiment, world.initial(), world.tokenizer)
    code, out, err = run("export", tmp_path / "a-run", "--out", tmp_path / "exported")
    assert (code, out) == (0, f"wrote {tmp_path / 'exported'}\n")
    assert "took --fit pad --normalise standard, say so if it was otherwise" in " ".join(err.split())
    said = sentence(run("export", tmp_path / "a-run", "--out", tmp_path / "exported", "--fit", "crop", "--normalise", "none"))
    assert said.endswith("is there already; name another folder, or add --replace")
    code, _, err = run(
        "export", tmp_path / "a-run/model", "--out", tmp_path / "exported", "--fit", "crop", "--normalise", "none", "--replace"
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "exported/preprocessor_config.json").read_text())["fit"] == "crop"


# ---- simulate, before it trains


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    wanted = yaml.safe_load(path.read_text())
    change(wanted)
    path.write_text(yaml.safe_dump(wanted))
    return path


def test_a_misspelt_key_is_named_with_the_right_one(path: Path, run: Run) -> None:
    said = sentence(run("simulate", edited(path, lambda wanted: wanted["model"].update(widht=32))))
    assert said.endswith("unknown key 'model.widht'; did you mean 'width'?")


def test_a_misspelt_key_is_found_before_anything_heavy_is_imported(path: Path) -> None:
    edited(path, lambda wanted: wanted.update(sede=3))
    program = f"import sys; sys.argv = ['fedmix', 'simulate', {str(path)!r}]\nfrom fedmix import cli\ntry:\n    cli.main()\n"
    program += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout == "1 False\n"
    assert answer.stderr.endswith("unknown key 'sede'; did you mean 'seed'?\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "no config at nowhere.yaml; configs/ holds examples, configs/demo.yaml is a start"),
        (["little.yaml", "--set", "seed"], "--set 'seed': write it as key=value"),
        (["little.yaml", "--set", "model.width=17"], "model: width = 17 must be a multiple of its number of heads"),
        (["little.yaml", "--set", "data.sites.north.stream=sound"], "data.sites.0.stream = 'sound'"),
        (["little.yaml", "--seed", "-1"], "seed = -1"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments: list[str], said: str, path: Path, run: Run) -> None:
    assert said in sentence(run("simulate", *arguments))


def test_a_missing_shard_is_one_sentence(path: Path, run: Run, tmp_path: Path) -> None:
    site = {"name": "north", "stream": "image", "shard": str(tmp_path / "nowhere")}
    said = sentence(run("simulate", edited(path, lambda wanted: wanted["data"]["sites"].__setitem__(0, site))))
    assert said == f"site north: there is no shard at {tmp_path / 'nowhere'}; make one with `fedmix prepare`"
    manifest = json.loads((tmp_path / "runs/little/manifest.json").read_text())
    assert (manifest["state"], manifest["cause"]) == ("failed", said)


def test_a_run_that_failed_before_it_trained_can_be_started_again_in_its_folder(path: Path, run: Run) -> None:
    edited(path, lambda wanted: wanted["data"]["sites"][0]["phantom"].update(look="nroth"))
    said = sentence(run("simulate", path))
    assert said.startswith("site north: there is no look 'nroth'; it is one of ")
    assert sentence(run("simulate", path)) == said


def test_a_held_out_set_without_test_studies_is_one_sentence(path: Path, run: Run) -> None:
    edited(path, lambda wanted: wanted["data"]["held_out"].update(probe_studies=80))
    assert "leaves no test study of 80" in sentence(run("simulate", path))


def test_a_warm_start_is_shown_once_before_anything_is_drawn(path: Path, run: Run, tmp_path: Path) -> None:
    vit = VisionTransformer(img_size=48, patch_size=12, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    edited(path, lambda wanted: wanted["data"]["held_out"].update(probe_studies=80))  # stops it afterwards
    answer = run("simulate", path, "--set", "model.warm_start.image=vit.safetensors")
    assert "leaves no test study of 80" in sentence(answer)
    assert answer[1].count("warm start") == 1
    assert "the first 1 of the image checkpoint's 2 layers were taken, the others are left out" in " ".join(answer[1].split())


def test_a_warm_start_of_another_width_is_one_sentence_and_leaves_no_run(path: Path, run: Run, tmp_path: Path) -> None:
    save_file(VisionTransformer(embed_dim=24, depth=1, num_heads=2).state_dict(), tmp_path / "vit.safetensors")
    said = sentence(run("simulate", path, "--set", "model.warm_start.image=vit.safetensors"))
    assert said.startswith("model.warm_start.image is 24 wide and model.width is 16; set model.width = 24")
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_that_is_not_there_is_one_sentence(path: Path, run: Run, tmp_path: Path) -> None:
    edited(path, lambda wanted: wanted["data"].update(tokenizer=str(tmp_path / "nowhere")))
    assert "tokenizer folder has no tokenizer.json" in sentence(run("simulate", path))


@pytest.mark.parametrize("folder", ["file/run", "/proc/fedmix"])
def test_a_run_folder_that_cannot_be_written_is_one_sentence(folder: str, path: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = sentence(run("simulate", path, "--out", folder))
    assert said.startswith(f"cannot write the run folder {folder}")
    assert said.endswith("choose another with --out")


@pytest.mark.parametrize("cache", ["file/phantoms", "/proc/fedmix"])
def test_a_cache_that_cannot_be_written_is_one_sentence(cache: str, path: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = sentence(run("simulate", path, "--set", f"data.cache={cache}"))
    assert said.startswith(f"cannot keep phantoms under {cache}: ")
    assert said.endswith("set data.cache to a folder you may write")


def test_a_run_folder_that_holds_a_run_is_one_sentence_and_the_run_stays(path: Path, run: Run, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs/little", config.load(path), resume=False)
    before = (tmp_path / "runs/little/manifest.json").read_bytes()
    assert "already holds a run; go on with --resume" in sentence(run("simulate", path))
    assert (tmp_path / "runs/little/manifest.json").read_bytes() == before
    assert store.run_id in before.decode()


def test_resume_without_a_run_is_one_sentence(path: Path, run: Run) -> None:
    said = sentence(run("simulate", path, "--resume"))
    assert said == "runs/little holds no run to resume; start it without --resume"


def test_resume_of_a_changed_experiment_is_one_sentence(path: Path, run: Run, tmp_path: Path) -> None:
    RunStore(tmp_path / "runs/little", config.load(path), resume=False)
    said = sentence(run("simulate", path, "--resume", "--set", "seed=4"))
    assert said.startswith("the experiment has changed since the run in runs/little began (fingerprints differ)")


# ---- the small commands


def test_the_schema_is_json_and_knows_every_section(run: Run) -> None:
    code, out, _ = run("config", "schema")
    assert code == 0
    schema = json.loads(out)
    assert {"data", "model", "stages"} <= set(schema["properties"])
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_show_prints_a_config_that_means_the_same(path: Path, run: Run) -> None:
    code, out, _ = run("config", "show", path, "--set", "seed=5")
    assert code == 0
    shown = config.parse(out)
    assert shown == config.load(path, ["seed=5"])
    assert out.startswith(f"# fingerprint {shown.fingerprint()}\n")


def test_phantom_lists_its_looks(run: Run) -> None:
    code, out, _ = run("phantom", "--looks")
    assert code == 0
    assert {"north", "east", "unseen"} <= set(out.split())


def test_phantom_draws_a_contact_sheet(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("phantom", "--preview", "sheet.png", "--size", "48")
    assert code == 0
    assert "wrote sheet.png" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 48


@pytest.mark.parametrize("name", ["nowhere/sheet.png", "sheet.nosuchkind", "/proc/sheet.png"])
def test_a_sheet_that_cannot_be_written_is_one_sentence(name: str, run: Run) -> None:
    said = sentence(run("phantom", "--preview", name, "--size", "48"))
    assert said.startswith(f"cannot write {name}")


def test_help_names_every_bench(run: Run) -> None:
    _, out, _ = run("bench", "--help")
    assert f"Benches: {', '.join(BENCHES)}." in " ".join(out.split())


def test_an_unknown_bench_is_one_sentence(run: Run) -> None:
    assert "no bench 'nosuch'; there are step, federation, prepare" in sentence(run("bench", "nosuch"))


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_folder_that_is_no_run_is_one_sentence(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in sentence(run(name, "empty"))
    assert "nowhere" in sentence(run(name, "nowhere"))


def test_a_study_is_compared_by_its_methods_and_never_with_a_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    wanted = values(tmp_path, study={"seeds": [1, 2], "regimes": {"main": {}}})
    (tmp_path / "study/config.yaml").write_text(yaml.safe_dump(wanted))
    code, out, err = run("compare", "study", "--out", "page.html")
    assert (code, err) == (0, "")
    assert "0 of 2 runs complete: 1 regime, 2 seeds." in out
    assert "0 of 2 runs" in (tmp_path / "page.html").read_text()
    assert run("report", "study")[0] == 0
    assert (tmp_path / "study/compare.html").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text("{}")
    assert "some of these folders hold a study and some a single run" in sentence(run("compare", "study", "run"))


# ---- prepare table


def table(folder: Path, num_good: int, num_bad: int) -> Path:
    """A folder with a CSV and its pictures, some of which are none; beside it a site key, so that splits stay the same."""
    (folder / "images").mkdir(parents=True)
    (folder.parent / "site.key").write_bytes(bytes(range(32)))
    (folder.parent / "site.key").chmod(0o600)
    chance = np.random.default_rng(0)
    with (folder / "studies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "image", "text"])
        for number in range(num_good + num_bad):
            name = f"images/{number}.png"
            if number < num_good:
                Image.fromarray(chance.integers(0, 255, (60, 60), dtype=np.uint8)).save(folder / name)
            else:
                (folder / name).write_bytes((folder / "images/0.png").read_bytes()[:200])
            writer.writerow([f"p{number}", name, "No pleural effusion."])
    return folder


def test_an_unreadable_picture_is_left_out_with_its_code_and_the_command_succeeds(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "data", 9, 1)
    code, out, err = run("prepare", "table", "data", "--out", "shard", "--size", "48", "--stream", "paired", "--workers", 1)
    assert code == 0, err
    assert "shard: 9 studies of 10 rows" in out
    assert "left out: image_broken" in out
    lines = (tmp_path / "shard/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["code"] for line in lines] == ["image_broken"]
    assert "9.png" not in (tmp_path / "shard/quarantine.jsonl").read_text()


def test_sex_and_age_band_go_in_only_where_the_command_asks_for_them(run: Run, tmp_path: Path) -> None:
    path = table(tmp_path / "data", 6, 0) / "studies.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},sex,age", *(f"{row},F,83" for row in rows)]))
    prepare = ("prepare", "table", "data", "--size", "48", "--workers", 1, "--out")
    code, out, _ = run(*prepare, "usual")
    assert (code, "--keep-characteristics" in out) == (0, False)
    code, out, _ = run(*prepare, "kept", "--keep-characteristics")
    assert code == 0
    assert "Sex is kept of 6 and the age band of 6 studies" in out
    said = {name: json.loads((tmp_path / name / "shard.json").read_text())["deidentification"] for name in ("usual", "kept")}
    options = {name: one["options"]["Retain Patient Characteristics"] for name, one in said.items()}
    assert options["usual"].startswith("not applied")
    assert options["kept"].startswith("applied")
    checked = run("shard", "check", "kept")[1]
    assert "view unknown" in checked
    assert not {"sex", "80+", "age"} & set(checked.replace(":", " ").split())


def test_too_many_unreadable_pictures_fail_the_command_and_leave_no_shard(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "data", 6, 4)
    said = sentence(run("prepare", "table", "data", "--out", "shard", "--size", "48", "--workers", 1))
    assert "of all 10" in said
    assert not (tmp_path / "shard").exists()


def test_a_missing_table_is_one_sentence(run: Run, tmp_path: Path) -> None:
    sentence(run("prepare", "table", "nowhere", "--out", "shard"))
    (tmp_path / "data").mkdir()
    sentence(run("prepare", "table", "data", "--out", "shard"))


def test_the_layouts_of_the_command_are_those_there_are() -> None:
    assert [choice.value for choice in LayoutChoice] == list(LAYOUTS)


def test_options_of_the_table_are_refused_elsewhere(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for option in ("--csv", "--text-column"):
        assert "for the layout table; nih14 knows its own" in sentence(
            run("prepare", "nih14", "data", "--out", "s", option, "x")
        )
    said = sentence(run("prepare", "padchest", "data", "--out", "s", "--lang", "es"))
    assert "padchest knows the language of its reports" in said
    said = sentence(run("prepare", "mimic-cxr", "data", "--out", "s", "--part", "third"))
    assert "--part is 'third'; give a part and how many there are, such as 1/3" in said
    said = sentence(run("prepare", "openi", "data", "--out", "s", "--shares", "1"))
    assert "--shares is '1'; give three numbers that add up to 1, such as 0.8,0.1,0.1" in said


def test_a_data_set_is_prepared_by_its_layout(run: Run, tmp_path: Path) -> None:
    report = (
        '<eCitation><uId id="CXR{0}"/><AbstractText Label="FINDINGS">Seen {1}.</AbstractText>'
        "<AbstractText Label='INDICATION'>Cough.</AbstractText></eCitation>"
    )
    (tmp_path / "data/ecgen-radiology").mkdir(parents=True)
    for number, when in enumerate(("XXXX", "again", "12/03/2019"), start=1):
        (tmp_path / f"data/ecgen-radiology/{number}.xml").write_text(report.format(number, when))
    code, out, err = run("prepare", "openi", "data", "--out", "shard", "--max-bad-share", "0.5", "--workers", 1)
    assert (code, err) == (0, "")
    assert "shard: 2 studies of 3 rows" in out
    assert "left out: phi_date" in out
    code, out, _ = run("prepare", "openi", "data", "--out", "shard", "--phi", "count", "--sections", "indication", "--replace")
    assert "shard: 3 studies of 3 rows" in out
    assert "phi_date" not in out  # the section that holds it was not taken


# ---- shard check


def test_a_sites_shards_are_checked_together(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        table(tmp_path / name, 5, 0)
        assert run("prepare", "table", name, "--out", f"{name}-shard", "--size", "48", "--workers", 1)[0] == 0
    code, out, err = run("shard", "check", "one-shard", "two-shard")
    assert (code, err) == (0, "")
    assert "one-shard: 5 studies of 5 patients" in out
    assert "5 patients stand in more than one" in out
    with (tmp_path / "two-shard/images.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    assert "does not have the hash it was written with" in sentence(run("shard", "check", "one-shard", "two-shard"))


# ---- shard preview


def test_a_shard_is_looked_at_while_it_is_prepared_or_later(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "data", 5, 1)
    prepare = ("prepare", "table", "data", "--out", "shard", "--size", "48", "--workers", 1, "--preview")
    assert "must not lie in a shard" in sentence(run(*prepare, "shard/look"))
    assert not (tmp_path / "shard").exists()
    code, out, err = run(*prepare, "now")
    assert (code, err) == (0, "")
    assert "look at now/index.html" in out
    assert run("shard", "preview", "shard", "--out", "later") == (0, "look at later/index.html\n", "")
    for name in ("index.html", "sheet.png"):
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    assert "image_broken" in (tmp_path / "now/index.html").read_text()
    assert "must not lie in a shard" in sentence(run("shard", "preview", "shard", "--out", "shard/look"))
    code, _, err = run("shard", "check", "shard")
    assert (code, err) == (0, "")


# ---- evaluate


@pytest.fixture
def model(tmp_path: Path) -> Path:
    world = World(tmp_path / "world", everyone(tmp_path))
    save_model(tmp_path / "model", world.experiment, world.initial(), world.tokenizer)
    return tmp_path / "model"


def test_a_model_is_evaluated_on_a_tiny_shard(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 120, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "48", "--workers", 1)[0] == 0
    code, out, err = run("evaluate", model, "--data", "shard", "--out", "evaluation")
    assert code == 0, err
    assert "psnr_db" in out
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert 0.0 <= found["retrieval"]["image_to_text"]["r@10"] <= 1.0
    asked = ("--rerank-top", 5, "--fine-tune-steps", 2, "--prompt-tune-steps", 2)
    code, out, err = run("evaluate", model, "--data", "shard", "--out", "evaluation", *asked)
    assert code == 0, err
    assert "left out: retrieval/reranked: the model was never trained on matching" in out
    for place in ("fine_tune", "prompt_tune"):
        assert f"left out: classification/{place}: the" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "--data", "nowhere"], "there is no shard folder"),
        (["nowhere", "--data", "shard"], "nowhere is no model folder: config.json is missing"),
        (["world", "--data", "shard"], "world is no model folder"),
    ],
)
def test_evaluate_says_what_is_missing(arguments: list[str], said: str, model: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(next((tmp_path / "phantoms").iterdir()), tmp_path / "shard")
    assert said in sentence(run("evaluate", *arguments))


def test_evaluate_says_where_it_cannot_write(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 60, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "48", "--workers", 1)[0] == 0
    assert "/proc/evaluation" in sentence(run("evaluate", model, "--data", "shard", "--out", "/proc/evaluation"))


def test_a_shard_of_another_size_is_one_sentence(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 20, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "60", "--workers", 1)[0] == 0
    said = sentence(run("evaluate", model, "--data", "shard"))
    assert "images of 60 px, the model wants 48; prepare it with --size 48, or evaluate a resampled model" in said


def test_a_model_is_resampled_to_a_shard_of_another_size_if_asked(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 60, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "60", "--workers", 1)[0] == 0
    code, out, err = run("evaluate", model, "--data", "shard", "--image-size", 60)
    assert code == 0, err
    assert "psnr_db" in out
    said = sentence(run("evaluate", model, "--data", "shard", "--image-size", 50))
    assert "image size 50 must be twice the model's patch of 12 pixels, or a larger multiple of it" in said


# ---- audit


def test_a_model_is_audited_on_a_tiny_shard(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 240, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "48", "--workers", 1)[0] == 0
    both = ("--members", "shard", "--non-members", "shard", "--draws", 1)
    code, out, err = run("audit", model, *both, "--reference", model, "--out", "found")
    assert code == 0, err
    assert "Whole patients" in out
    found = json.loads((tmp_path / "found/leakage.json").read_text())
    assert found["membership"]["patient"]["auc"] == 0.5, "a model is no better than itself"
    assert found["audited"]["weights_sha256"]
    assert "What this model gives away" in (tmp_path / "found/leakage.html").read_text()
    assert "/proc/found" in sentence(run("audit", model, *both, "--out", "/proc/found"))
    shutil.copytree(next((tmp_path / "phantoms").iterdir()), tmp_path / "trained")
    said = sentence(run("audit", model, "--members", "trained", "--non-members", "trained"))
    assert said.startswith("there are no non-members")


def test_canaries_are_planted_and_looked_for_and_an_update_is_audited(model: Path, run: Run, tmp_path: Path) -> None:
    folder = table(tmp_path / "data", 240, 0)
    assert run("prepare", "table", folder, "--out", "shard", "--size", "48", "--workers", 1)[0] == 0
    code, out, err = run("canaries", "--out", "canaries", "--size", 48, "--words", 5, "--each", 1)
    assert code == 0, err
    assert "4 canaries of 15 patients" in out
    assert run("shard", "check", "shard", "canaries/shard")[0] == 0, "they fit a site's own shards"
    both = ("--members", "shard", "--non-members", "shard", "--draws", 1, "--most-patients", 20)
    named = ("--canaries", "canaries/canaries.json", "--update", model, model)
    code, out, err = run("audit", model, *both, *named, "--out", "found")
    assert code == 0, err
    found = json.loads((tmp_path / "found/leakage.json").read_text())
    assert set(found["canaries"]) == {"texts", "images"}
    assert found["update"]["membership"]["patient"]["auc"] == 0.5, "nothing moved"
    assert found["update"]["words"]["num_recovered"] == 0
    assert "Planted texts" in out
    assert "Words of an update" in out
    assert "are nothing; give --words or --size" in sentence(run("canaries", "--out", "none", "--size", 0, "--words", 0))
    assert "there is a shard in this place already" in sentence(run("canaries", "--out", "canaries", "--size", 48))


# ---- whole runs


@pytest.mark.e2e
def test_a_run_gives_a_report_that_the_other_commands_read(tmp_path: Path) -> None:
    wanted = values(
        tmp_path, baselines={"random_init": {}, "centralised": {}, "fedavg": {"aggregation": {"rule": "fedavg_all"}}}
    )
    path = write_config(tmp_path, wanted)
    first = fedmix("simulate", path, "--out", tmp_path / "run")
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert "Flower" not in first.stdout
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == 1
    assert set(report["baselines"]) == {"random_init", "centralised", "fedavg"}
    assert report["timing"]["overhead_ratio"] >= 1.0
    assert {site["name"]: site["examples"] for site in report["sites"]} == {"north": 8, "south": 8, "west": 16}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["state"] == "completed"
    assert (report["energy"]["kwh"] is None) == (manifest["hardware"]["gpus"] > 0)
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [row["round"] for row in told if row["event"] == "round"] == [1, 2, 3]
    assert "# little" in (folder / "report.md").read_text()
    assert "# Model card: little" in (folder / "model_card.md").read_text()

    # Taken up again, nothing is trained or evaluated twice and the report is the same but for its times.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors") if "checkpoints" in str(path)}
    again = fedmix("simulate", path, "--out", folder, "--resume")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "evaluating" not in again.stdout
    assert "round 1/3" not in again.stdout
    repeated = json.loads((folder / "report.json").read_text())
    for changing in ("timing", "run", "energy"):
        del report[changing], repeated[changing]
    assert repeated == report

    (folder / "report.html").unlink()
    assert fedmix("report", folder).returncode == 0
    assert "little" in (folder / "report.html").read_text()
    compared = fedmix("compare", folder, folder, "--out", tmp_path / "compared.md")
    assert compared.returncode == 0, compared.stderr
    assert "little" in (tmp_path / "compared.md").read_text()
    # Settings of the evaluation may change between starts; then what was kept is of no use.
    other = fedmix("simulate", path, "--out", folder, "--resume", "--set", "evaluation.gallery=30")
    assert other.returncode == 0, other.stderr
    assert "evaluating the model" in other.stdout
