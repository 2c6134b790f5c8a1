"""What a site keeps on its disk: moments and residuals of the last rounds, and the parameters it received last."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client import state as state_module
from client.state import NUM_KEPT, Memory, SiteState
from fedmix.errors import RunError


def memory(number: float) -> Memory:
    return Memory(
        moments={"adamw/a/exp_avg": torch.full((3, 2), number), "adamw/a/step": torch.tensor(number)},
        residual={"a": torch.full((3, 2), -number)},
    )


def save(state: SiteState, round_number: int, left: Memory) -> None:
    state.keep_moments(round_number, left.moments)
    state.finish(round_number, left.residual)


def opened(folder: Path, run: str = "run-1") -> SiteState:
    state = SiteState(folder, run)
    state.prepare()
    return state


def saved(folder: Path, *rounds: int) -> SiteState:
    state = opened(folder)
    for number in rounds:
        save(state, number, memory(float(number)))
    return state


def number_of(found: Memory) -> float | None:
    return float(found.moments["adamw/a/step"]) if found.moments else None


def residual_of(found: Memory) -> float | None:
    return -float(found.residual["a"][0, 0]) if found.residual else None


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def test_moments_and_residual_come_back_to_the_bit(tmp_path: Path) -> None:
    found = saved(tmp_path, 1).before(2, stage_began=1)
    assert bits(found.moments) == bits(memory(1.0).moments)
    assert bits(found.residual) == bits(memory(1.0).residual)


def test_a_round_finds_what_the_round_before_it_left(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, 3)
    found = [state.before(number, stage_began=1) for number in (1, 2, 3, 4, 9)]
    assert [number_of(one) for one in found] == [None, 1.0, 2.0, 3.0, 3.0]
    assert [residual_of(one) for one in found] == [None, 1.0, 2.0, 3.0, 3.0]


def test_a_site_that_missed_a_round_goes_on_from_its_last_one(tmp_path: Path) -> None:
    assert number_of(saved(tmp_path, 1, 3).before(3, stage_began=1)) == 1.0


def test_another_stage_takes_up_the_residual_and_not_the_moments(tmp_path: Path) -> None:
    found = saved(tmp_path, 1, 2).before(4, stage_began=3)
    assert (number_of(found), residual_of(found)) == (None, 2.0)


def test_a_repeated_round_drops_what_came_of_the_lost_one(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, 3)
    save(state, 2, memory(20.0))
    found = state.before(9, stage_began=1)
    assert (number_of(found), residual_of(found)) == (20.0, 20.0)


def test_enough_is_kept_for_a_server_that_falls_back_one_checkpoint(tmp_path: Path) -> None:
    # The server had committed 4 and its checkpoint is damaged; this site has finished 5. Round 4 is repeated, from 3.
    state = saved(tmp_path, 1, 2, 3, 4, 5)
    assert number_of(state.before(4, stage_began=1)) == 3.0
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [
        f"{kind}-0000{number}.safetensors" for kind in ("moments", "round") for number in (3, 4, 5)
    ]
    assert NUM_KEPT == 3


def test_a_round_killed_between_its_two_files_is_not_finished(tmp_path: Path) -> None:
    state = saved(tmp_path, 1)
    state.keep_moments(2, memory(2.0).moments)
    assert (number_of(state.before(3, stage_began=1)), residual_of(state.before(3, stage_began=1))) == (1.0, 1.0)


def test_a_repeated_round_killed_between_its_two_files_leaves_no_mixture(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, 3)
    state.keep_moments(2, memory(20.0).moments)
    found = state.before(9, stage_began=1)
    assert (number_of(found), residual_of(found)) == (1.0, 1.0)


def test_moments_that_are_gone_are_not_taken_for_none(tmp_path: Path) -> None:
    state = saved(tmp_path, 1)
    (tmp_path / "run-1" / "moments-00001.safetensors").unlink()
    with pytest.raises(RunError, match="optimiser state kept at this site cannot be read"):
        state.before(2, stage_began=1)


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    saved(tmp_path, 1).keep_received({"a": torch.ones(2)})
    other = opened(tmp_path, "run-2")
    assert other.before(2, stage_began=1) == Memory()
    assert other.received() == {}


def test_a_file_cut_short_by_a_kill_is_not_read(tmp_path: Path) -> None:
    state = saved(tmp_path, 1)
    (tmp_path / "run-1" / "round-00002.partial").write_bytes(b"half")
    assert number_of(state.before(3, stage_began=1)) == 1.0


def test_a_damaged_state_is_said_without_its_path(tmp_path: Path) -> None:
    state = saved(tmp_path, 1)
    (tmp_path / "run-1" / "round-00001.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="optimiser state kept at this site cannot be read") as caught:
        state.before(2, stage_began=1)
    assert str(tmp_path) not in str(caught.value)


# ---- the parameters received last


def test_received_parameters_come_back_to_the_bit_and_only_the_last(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert state.received() == {}
    for seed in (1, 2):
        last = {"a": torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)), "b": torch.tensor(float(seed))}
        state.keep_received(last)
    assert bits(state.received()) == bits(last)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["received.safetensors"]


def test_parameters_read_before_they_were_replaced_stay_as_they_were(tmp_path: Path) -> None:
    """They are mapped from the file, which must therefore be replaced and never written over."""
    state = opened(tmp_path)
    state.keep_received({"a": torch.ones(1000)})
    before = state.received()["a"]
    state.keep_received({"a": torch.zeros(1000)})
    assert float(before.sum()) == 1000.0


def test_received_parameters_are_no_round_s_state(tmp_path: Path) -> None:
    state = saved(tmp_path, 1)
    state.keep_received({"a": torch.ones(2)})
    save(state, 2, memory(2.0))
    assert number_of(state.before(3, stage_began=1)) == 2.0
    assert set(state.received()) == {"a"}


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_unreadable_parameters_count_as_none(damage: bytes | None, tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.keep_received({"a": torch.ones(2)})
    path = tmp_path / "run-1" / "received.safetensors"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert state.received() == {}


# ---- a disk that fails


def test_a_state_folder_that_is_none_is_said_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught:
        SiteState(tmp_path / "file", "run-1").prepare()
    assert str(caught.value) == "this site's state cannot be kept: Not a directory; let the agent write to its state folder"


def test_a_folder_that_went_away_is_said_without_its_path(tmp_path: Path) -> None:
    state = opened(tmp_path)
    (tmp_path / "run-1").rmdir()
    for what, keep in (
        ("the optimiser state", lambda: state.finish(1, {"a": torch.ones(2)})),
        ("the server's parameters", lambda: state.keep_received({"a": torch.ones(2)})),
    ):
        with pytest.raises(RunError, match=f"{what} cannot be kept at this site: No such file or directory; ") as caught:
            keep()
        assert str(tmp_path) not in str(caught.value)


def test_a_full_disk_is_said_without_its_path_and_the_last_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saved(tmp_path, 1)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(RunError) as caught:
        save(state, 2, memory(2.0))
    assert str(caught.value) == (
        "the optimiser state cannot be kept at this site: No space left on device; make room in its state folder"
    )
    assert number_of(state.before(3, stage_began=1)) == 1.0


def test_a_file_that_outgrows_its_limit_is_said_without_its_path(tmp_path: Path) -> None:
    """A real failure to write, as safetensors words it: the system's number is inside its text."""
    state = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError) as caught:
            save(state, 2, Memory({"adamw/a/exp_avg": torch.zeros(1000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        "the optimiser state cannot be kept at this site: File too large; let the agent write to its state folder"
    )
    assert number_of(state.before(3, stage_began=1)) == 1.0


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    """Safetensors writes to a file of its own making first; without this every kill would leave one of the state's size."""
    state = saved(tmp_path, 1)
    (tmp_path / "run-1" / ".tmpLrSfA6").write_bytes(b"half")
    (tmp_path / "run-1" / "received.partial").write_bytes(b"half")
    state.prepare()
    save(state, 2, memory(2.0))
    assert sorted(path.name for path in (tmp_path / "run-1").iterdir()) == [
        "moments-00001.safetensors",
        "moments-00002.safetensors",
        "round-00001.safetensors",
        "round-00002.safetensors",
    ]
