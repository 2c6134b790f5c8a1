"""The ServerApp: rounds, and a point of the learning curve every few of them, once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from little import World, values

from fedmix.federation.update import digest
from server import held_out as central
from server.app import build_app, quick_evaluation
from server.store import RunStore

EVALUATION = {"every": 2, "gallery": 40, "num_bootstrap": 20, "regeneration_images": 20}


def run(world: World) -> None:
    held_out = central.load(world.experiment.data, world.tokenizer)
    app = build_app(world.experiment, world.store, watch=world.seen.append, held_out=held_out)
    app(world.grid(), Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={}))


def points(store: RunStore) -> list[int]:
    lines = (store.folder / "metrics.jsonl").read_text().splitlines()
    return [row["round"] for row in map(json.loads, lines) if row["event"] == "evaluation"]


def test_the_app_runs_the_rounds_and_evaluates_every_few_and_at_the_end(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path, evaluation=EVALUATION))
    run(world)
    assert points(world.store) == [2, 3]
    committed = world.store.latest()
    assert committed is not None
    assert digest(committed.parameters) == digest(World(tmp_path / "plain", values(tmp_path)).run().parameters)
    row = next(row for row in world.seen if row["event"] == "evaluation")
    assert {"zero_shot/macro_auroc", "regeneration/psnr_db", "time/evaluate_s"} <= set(row["values"])


def test_a_point_is_told_once_however_often_the_run_is_taken_up(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path, evaluation=EVALUATION))
    run(world)
    run(World(tmp_path, values(tmp_path, evaluation=EVALUATION), resume=True))
    assert points(world.store) == [2, 3]


def test_a_point_lost_to_a_kill_is_made_up_for_with_the_same_numbers(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path, evaluation=EVALUATION))
    run(world)
    path = world.store.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "evaluation"
    path.write_text("".join(lines[:-1]))
    run(World(tmp_path, values(tmp_path, evaluation=EVALUATION), resume=True))
    again = json.loads(path.read_text().splitlines()[-1])
    before = json.loads(lines[-1])
    for row in (again, before):
        row["values"].pop("time/evaluate_s")
        row.pop("time")
    assert again == before


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_points_come_every_so_many_rounds_and_after_the_last(every: int, expected: list[int], tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path, evaluation=EVALUATION | {"every": every}))
    held_out = central.load(world.experiment.data, world.tokenizer)
    evaluate = quick_evaluation(world.experiment, world.store, world.seen.append, held_out)
    for number in (1, 2, 3):
        evaluate(number, "stage", world.initial())
    assert [row["round"] for row in world.seen] == expected
