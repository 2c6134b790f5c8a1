"""From an experiment's sites to shards: phantoms are drawn once, kept, and drawn again where the copy is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from little import values

from fedmix import config
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from simulations.partition import prepare_sites


def data(folder: Path, **changes: Any) -> config.Data:
    """The little federation's data; ``changes`` replace what the first site holds."""
    wanted = values(folder)
    wanted["data"]["sites"][0] |= changes
    return config.build(wanted).data


def prepared(wanted: config.Data) -> dict[str, Path]:
    return prepare_sites(wanted, Tokenizer.load())


def test_each_site_gets_studies_of_its_own_stream_only(tmp_path: Path) -> None:
    shards = {name: Shard.open(path) for name, path in prepared(data(tmp_path)).items()}
    assert {name: shard.stream_counts for name, shard in shards.items()} == {
        "north": {"image": 24, "text": 0, "paired": 0},
        "south": {"image": 0, "text": 24, "paired": 0},
        "west": {"image": 0, "text": 0, "paired": 24},
    }
    assert all(set(shard.split) == {"train"} for shard in shards.values())


def test_phantoms_are_drawn_once(tmp_path: Path) -> None:
    first = prepared(data(tmp_path))
    marks = {path: (path / "shard.json").stat().st_mtime_ns for path in first.values()}
    assert prepared(data(tmp_path)) == first
    assert {path: (path / "shard.json").stat().st_mtime_ns for path in first.values()} == marks
    assert len(list((tmp_path / "phantoms").iterdir())) == 3


@pytest.mark.parametrize("member", ["images.npy", "studies.parquet", "shard.json"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_damaged_copy_is_drawn_again_the_same(tmp_path: Path, member: str, is_there: bool) -> None:
    path = prepared(data(tmp_path))["north"]
    before = Shard.open(path).fingerprint
    (path / member).unlink()
    if is_there:
        (path / member).write_bytes(b"damaged")
    assert prepared(data(tmp_path))["north"] == path
    assert Shard.open(path).fingerprint == before


@pytest.mark.parametrize("change", [{"seed": 7}, {"look": "east"}, {"studies": 25}, {"difficulty": 0.5}])
def test_another_draw_has_another_place(tmp_path: Path, change: dict[str, Any]) -> None:
    phantom = {"studies": 24, "look": "north", "seed": 1}
    first = prepared(data(tmp_path, phantom=phantom))["north"]
    assert prepared(data(tmp_path, phantom=phantom | change))["north"] != first


def test_a_given_shard_is_taken_as_it_is(tmp_path: Path) -> None:
    path = shutil.copytree(prepared(data(tmp_path))["north"], tmp_path / "mine")
    assert prepared(data(tmp_path, phantom=None, shard=str(path)))["north"] == path


def test_a_missing_shard_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    wanted = values(tmp_path)
    wanted["data"]["sites"][2] = {"name": "west", "stream": "paired", "shard": str(tmp_path / "nowhere")}
    with pytest.raises(DataError, match=r"site west: there is no shard at .*nowhere; make one with `fedmix prepare`"):
        prepared(config.build(wanted).data)
    assert not (tmp_path / "phantoms").exists()


@pytest.mark.parametrize("place", ["a site", "the held-out set"])
def test_an_unknown_look_is_said_with_those_there_are_before_anything_is_drawn(tmp_path: Path, place: str) -> None:
    wanted = values(tmp_path)
    holder = wanted["data"]["held_out"] if place == "the held-out set" else wanted["data"]["sites"][2]
    holder["phantom"]["look"] = "nroth"
    with pytest.raises(DataError, match=r"there is no look 'nroth'; it is one of .*north") as caught:
        prepared(config.build(wanted).data)
    assert str(caught.value).startswith("data.held_out" if place == "the held-out set" else "site west")
    assert not (tmp_path / "phantoms").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file" / "phantoms", Path("/proc/fedmix")):
        wanted = values(tmp_path)
        wanted["data"]["cache"] = str(cache)
        with pytest.raises(DataError, match=r"cannot keep phantoms under .*; set data.cache to a folder you may write"):
            prepared(config.build(wanted).data)
