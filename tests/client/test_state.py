"""Optimiser moments on a site's disk, one file a round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.state import NUM_KEPT, OptimiserStore
from fedmix.errors import RunError


def moments(number: float) -> dict[str, torch.Tensor]:
    return {"adamw/a/exp_avg": torch.full((3, 2), number), "adamw/a/step": torch.tensor(number)}


def saved(folder: Path, *rounds: int) -> OptimiserStore:
    store = OptimiserStore(folder, "run-1")
    for number in rounds:
        store.save(number, moments(float(number)))
    return store


def number_of(state: dict[str, torch.Tensor] | None) -> float | None:
    return None if state is None else float(state["adamw/a/step"])


def test_moments_come_back_to_the_bit(tmp_path: Path) -> None:
    found = saved(tmp_path, 1).before(2, since=1)
    assert found is not None
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in moments(1.0).items()
    }


def test_a_round_finds_the_state_after_the_round_before_it(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    assert [number_of(store.before(number, since=1)) for number in (1, 2, 3, 4, 9)] == [None, 1.0, 2.0, 3.0, 3.0]


def test_a_site_that_missed_a_round_goes_on_from_its_last_one(tmp_path: Path) -> None:
    assert number_of(saved(tmp_path, 1, 3).before(3, since=1)) == 1.0


def test_moments_of_another_stage_are_not_taken_up(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2).before(4, since=3) is None


def test_a_repeated_round_drops_what_came_of_the_lost_one(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    store.save(2, moments(20.0))
    assert number_of(store.before(9, since=1)) == 20.0


def test_enough_is_kept_for_a_server_that_falls_back_one_checkpoint(tmp_path: Path) -> None:
    # The server had committed 4 and its checkpoint is damaged; this site has finished 5. Round 4 is repeated, from 3.
    store = saved(tmp_path, 1, 2, 3, 4, 5)
    assert number_of(store.before(4, since=1)) == 3.0
    assert len(list(tmp_path.rglob("*.safetensors"))) == NUM_KEPT == 3


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert OptimiserStore(tmp_path, "run-2").before(2, since=1) is None


def test_a_file_cut_short_by_a_kill_is_not_read(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "run-1" / "round-00002.partial").write_bytes(b"half")
    assert number_of(store.before(3, since=1)) == 1.0


def test_a_damaged_state_is_said_without_its_path(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "run-1" / "round-00001.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="optimiser state kept at this site cannot be read") as caught:
        store.before(2, since=1)
    assert str(tmp_path) not in str(caught.value)


def test_a_state_folder_that_cannot_be_written_is_said_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot be kept at this site: Not a directory; make room in its state folder"
    ) as caught:
        OptimiserStore(tmp_path / "file", "run-1").save(1, moments(1.0))
    assert str(tmp_path) not in str(caught.value)
