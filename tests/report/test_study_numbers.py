"""A study's numbers: means, intervals and differences by hand, costs counted from what the runs recorded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from synthetic_study import LEVELS, plan, write_cell, write_study

from fedmix import config
from fedmix.errors import RunError
from fedmix.report.study import MEASURES, as_json, estimate, is_study, read_study, step_key

PSNR, BITS = "psnr_db", "bits_per_token"  # the synthetic ones are 14 + 8.4 x level and 10.9 - 9.1 x level


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


def test_the_interval_is_student_s_t_over_seeds() -> None:
    found = estimate({1: 1.0, 2: 2.0, 3: 3.0})
    assert found is not None
    assert found.mean == pytest.approx(2.0)
    # s = 1, n = 3, and the .975 quantile of t with 2 degrees of freedom is 4.3027.
    half = 4.3027 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert not found.is_clear
    assert found.num_seeds == 3


def test_one_seed_has_no_interval_and_none_has_no_estimate() -> None:
    found = estimate({7: 0.5})
    assert found is not None
    assert (found.mean, found.interval, found.is_clear) == (0.5, None, False)
    assert estimate({}) is None


def test_means_and_paired_differences_are_those_of_the_cells(folder: Path) -> None:
    study = read_study(folder)
    ours, theirs = (study.estimate("plentiful", method, PSNR) for method in ("fedmix", "paired_only"))
    less = study.difference("plentiful", "paired_only", PSNR)
    assert ours is not None
    assert theirs is not None
    assert less is not None
    assert ours.mean == pytest.approx(14 + 8.4 * 0.80)
    assert less.by_seed == pytest.approx({1: 8.4 * 0.02, 2: 8.4 * 0.04, 3: 8.4 * 0.02})
    assert less.mean == pytest.approx(ours.mean - theirs.mean)
    # Both rise and fall with the seed, so the difference is clear where the two intervals overlap.
    assert less.interval is not None
    assert ours.interval is not None
    assert less.interval[1] - less.interval[0] < (ours.interval[1] - ours.interval[0]) / 2
    assert study.methods == ("fedmix", "paired_only", "site_west", "best_site", "centralised")
    assert study.standing == "6 of 6 runs complete: 2 regimes, 3 seeds each."


def test_recovered_gap_is_of_the_means_and_knows_which_way_is_better(folder: Path) -> None:
    study = read_study(folder)
    for measure in (PSNR, BITS):
        assert study.recovered_gap("plentiful", measure, "centralised") == pytest.approx((0.80 - 0.5) / (0.9 - 0.5))
        assert study.recovered_gap("scarce", measure, "centralised") == pytest.approx((0.60 - 0.2) / (0.7 - 0.2))
    assert study.recovered_gap("plentiful", PSNR, "centralised_steps") is None, "no such method"


def test_without_a_lead_of_pooled_training_there_is_no_gap(tmp_path: Path) -> None:
    worse = {regime: [seed | {"centralised": 0.1} for seed in seeds] for regime, seeds in LEVELS.items()}
    study = read_study(write_study(tmp_path / "study", worse))
    assert all(study.recovered_gap("plentiful", measure, "centralised") is None for measure in MEASURES)


def test_costs_are_counted_from_what_each_run_recorded(folder: Path) -> None:
    study = read_study(folder)
    # Two steps a round: image and text site once, at .5 and .25 s a step, the paired site in two rounds, at 2 s.
    main = study.cost("plentiful", "fedmix")
    assert main is not None
    assert (main.steps, dict(main.examples), main.bytes_up) == (8, {"image": 8, "text": 8, "paired": 16}, 4000)
    assert main.core_s == pytest.approx(2 * 0.5 + 2 * 0.25 + 4 * 2.0)
    alone, best, pooled = (study.cost("scarce", method) for method in ("site_west", "best_site", "centralised"))
    assert alone is not None
    assert alone == best, "the best site cost what that site cost"
    assert alone.core_s == pytest.approx(4.0)
    assert alone.bytes_up == 0, "nothing leaves a site that trains for itself"
    assert pooled is not None
    assert (pooled.steps, pooled.core_s, pooled.bytes_up) == (8, 9.0, 0)


def test_without_measured_steps_core_seconds_are_unknown_and_not_zero(folder: Path) -> None:
    (folder / "costs.json").unlink()
    cost = read_study(folder).cost("plentiful", "fedmix")
    assert cost is not None
    assert cost.core_s is None
    assert cost.steps == 8


def test_a_step_s_key_moves_with_what_decides_its_cost_and_with_nothing_else(tmp_path: Path) -> None:
    one = config.build(plan(tmp_path))
    key = step_key(one, one.stages[0], "image")
    assert key.startswith("image/4/")
    for same in ({"seed": 9}, {"name": "other"}):
        assert step_key(one.model_copy(update=same), one.stages[0], "image") == key
    longer = one.stages[0].model_copy(update={"rounds": 7})
    assert step_key(one, longer, "image") == key
    assert step_key(one, one.stages[1], "image") != key, "other objectives"
    wider = one.model_copy(update={"model": one.model.model_copy(update={"width": 32})})
    assert step_key(wider, one.stages[0], "image") != key


def test_an_unfinished_study_is_read_as_far_as_it_has_come(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {"plentiful": LEVELS["plentiful"][:2], "scarce": []})
    study = read_study(folder)
    assert study.standing == "2 of 6 runs complete: 2 regimes, 3 seeds each."
    found = study.estimate("plentiful", "fedmix", PSNR)
    assert found is not None
    assert found.num_seeds == 2
    assert study.estimate("scarce", "fedmix", PSNR) is None
    assert study.cost("scarce", "fedmix") is None


def test_an_unfinished_cell_gives_what_it_has_evaluated(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {"plentiful": LEVELS["plentiful"]})
    cell = folder / "scarce/seed-1"
    write_cell(cell, LEVELS["scarce"][0], state="running")
    report = json.loads((cell / "report.json").read_text())
    for name, branch in (
        ("", report["evaluation"]),
        ("baselines/paired_only", report["baselines"]["paired_only"]["evaluation"]),
    ):
        (cell / name / "evaluation").mkdir()
        (cell / name / "evaluation/evaluation.json").write_text(json.dumps({"of": "", "report": branch, "seconds": 1.0}))
    study = read_study(folder)
    [unfinished] = [one for one in study.cells if one.regime == "scarce" and one.seed == 1]
    assert unfinished.state == "unfinished"
    assert set(unfinished.methods) == {"fedmix", "paired_only"}
    less = study.difference("scarce", "paired_only", PSNR)
    assert less is not None
    assert less.mean == pytest.approx(8.4 * 0.3)
    assert study.num_done == 3


def test_a_failed_cell_is_counted_and_keeps_its_cause(folder: Path) -> None:
    broken = folder / "scarce/seed-2"
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps({"state": "failed", "cause": "the disk is full"}))
    study = read_study(folder)
    assert study.standing == "5 of 6 runs complete, 1 failed: 2 regimes, 3 seeds each."
    assert [cell.cause for cell in study.cells if cell.state == "failed"] == ["the disk is full"]


def test_study_json_holds_the_cells_and_the_summary_in_plain_numbers(folder: Path) -> None:
    values = json.loads(json.dumps(as_json(read_study(folder)), allow_nan=False))
    assert values["schema"] == 1
    assert values["measures"][BITS] == {"title": "Bits per token", "unit": "", "better": "lower"}
    cell = values["cells"][0]
    assert (cell["regime"], cell["seed"], cell["state"], cell["folder"]) == ("plentiful", 1, "completed", "plentiful/seed-1")
    assert cell["methods"]["best_site"]["site"] == "site_west"
    assert cell["methods"]["fedmix"]["scores"][PSNR] == pytest.approx(14 + 8.4 * 0.8)
    found = values["summary"]["plentiful"]["paired_only"][PSNR]
    assert found["n"] == 3
    assert found["less"]["mean"] == pytest.approx(8.4 * 0.08 / 3)
    assert values["summary"]["plentiful"]["fedmix"][PSNR]["less"] is None
    assert values["recovered_gap"]["plentiful"]["centralised"][PSNR] == pytest.approx(0.75)


def test_a_run_is_no_study_and_a_folder_of_neither_is_said(folder: Path, run_dir: Path, tmp_path: Path) -> None:
    assert is_study(folder)
    assert not is_study(run_dir)
    assert not is_study(tmp_path / "nowhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.yaml").write_text((folder / "plentiful/seed-1/config.yaml").read_text())
    with pytest.raises(RunError, match=r"its config\.yaml has no seeds"):
        read_study(tmp_path / "odd")
    (tmp_path / "odd/config.yaml").write_text("nonsense: [")
    with pytest.raises(RunError, match="holds no readable study"):
        read_study(tmp_path / "odd")


@pytest.mark.parametrize(
    "privacy", [{"mode": "dp", "noise_multiplier": 1.0}, {"mode": "none", "trainable": "adapters"}], ids=["noised", "adapters"]
)
def test_a_step_of_another_kind_than_was_measured_has_no_cost(privacy: dict[str, object], tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    known = read_study(folder).cost("plentiful", "paired_only")
    place = folder / "plentiful/seed-1/baselines/paired_only/config.yaml"
    values = yaml.safe_load(place.read_text())
    for stage in values["stages"]:
        stage.pop("objectives", None)
    place.write_text(yaml.safe_dump(values | {"privacy": privacy}))
    found = read_study(folder).cost("plentiful", "paired_only")
    assert known is not None
    assert found is not None
    assert known.core_s is not None
    assert found.core_s is None
    assert found.steps == known.steps
