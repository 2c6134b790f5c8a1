"""Benches on settings that take no time: what their lines say is true, whatever the clock says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from little import ROOT, values, write_config

from fedmix import cli, config
from fedmix.data import dicom
from fedmix.errors import ConfigError, RunError
from fedmix.federation.update import num_bytes
from server import held_out as central
from server.gathering import for_stream
from simulations.bench import Line, federation, nvflare, prepare, trivial
from simulations.bench.cases import BENCHES

TINY = trivial.Size(num_sites=3, num_rounds=2, num_values=20_000, coding="int8")


def checked(line: Line, case: str, bench: str = "federation") -> Line:
    """The line, which has the form that readers of benches rely on."""
    assert json.loads(json.dumps(line)) == line
    assert list(line)[:6] == ["bench", "case", "value", "unit", "against", "ratio"]
    assert (line["bench"], line["case"]) == (bench, case)
    assert ("skipped" in line) == (line["ratio"] is None)
    return line


@pytest.mark.parametrize("coding", ["float32", "int8", "int4"])
def test_trivial_sites_train_through_the_real_rounds_to_the_model_that_is_known(coding: str, tmp_path: Path) -> None:
    size = trivial.Size(num_sites=3, num_rounds=2, num_values=20_000, coding=coding)
    store = trivial.federate("sequential", size, tmp_path / "run")
    trivial.check(store, size)
    committed = store.latest()
    assert committed is not None
    assert sum(value.numel() for value in committed.parameters.values()) == pytest.approx(20_000, rel=0.01)
    with pytest.raises(RunError, match="1 parameters are not what 1 rounds make of them"):
        trivial.check(store, trivial.Size(num_sites=3, num_rounds=1, num_values=20_000, coding=coding))


def test_a_site_that_is_dropped_ends_a_bench_instead_of_saving_it_work() -> None:
    with pytest.raises(RunError, match="dropped: too late"):
        trivial._stop_at_trouble({"event": "dropped", "why": "too late"})


def test_peak_memory_is_this_process_own_and_grows_with_what_it_holds() -> None:
    before = trivial.peak_bytes()
    held = b"x" * (256 << 20)
    assert trivial.peak_bytes() >= before
    assert trivial.peak_bytes() > len(held)


def test_a_bench_without_nvflare_or_without_disk_says_so_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()  # a file: no environment can be made below it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = checked(federation.vs_nvflare(TINY), "vs_nvflare")
    assert "environment for NVFLARE" in str(line["skipped"])
    endless = trivial.Size(num_sites=32, num_rounds=1, num_values=10**15, coding="float32")
    assert "GiB of disk" in str(checked(federation.server_memory(endless), "server_memory")["skipped"])


def test_an_unknown_case_is_one_sentence_and_every_case_has_its_name() -> None:
    assert list(BENCHES["federation"]) == ["overhead", "vs_ray", "vs_nvflare", "server_memory", "bytes_up"]
    assert list(BENCHES["prepare"]) == ["workers_1", "workers_2", "workers_2_plain_2"]
    with pytest.raises(ConfigError, match=r"no case 'nosuch'; there are floor, .*overhead, .*workers_2"):
        cli.bench("federation", "nosuch")


def test_the_bench_of_bytes_reads_the_demo_and_the_bench_of_overhead_trains_a_vit_s() -> None:
    assert config.load(federation.DEMO).name == "demo"
    assert ROOT / "configs/demo.yaml" == federation.DEMO
    experiment = config.build(federation.VIT_S)
    model = central.initial_model(experiment, central.Tokenizer.load())
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert sum(sizes.values()) == pytest.approx(24.9e6, rel=0.01)
    assert sum(size for name, size in sizes.items() if not name.startswith(("embed_text", "word_head"))) == pytest.approx(
        22e6, rel=0.02
    )


def test_the_files_of_the_bench_of_prepare_are_one_picture_in_every_compression(tmp_path: Path) -> None:
    names = prepare.write_files(tmp_path, 1, (300, 240))
    assert len(names) == 3
    pictures = [dicom.read_pixels((tmp_path / name).read_bytes()) for name in names]
    assert pictures[0].shape == (300, 240)
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert len({dicom.read_header((tmp_path / name).read_bytes()).transfer_syntax for name in names}) == 3


# ---- real runs, tiny


@pytest.mark.e2e
def test_walled_and_plain_loops_are_timed_over_the_same_files() -> None:
    line = checked(prepare.speed(2, num_pictures=1, shape=(300, 240)), "workers_2", "prepare")
    checked(prepare.speed(2, num_plain=2, num_pictures=1, shape=(300, 240)), "workers_2_plain_2", "prepare")
    assert isinstance(line["ratio"], float)
    assert line["ratio"] > 0


@pytest.mark.e2e
def test_overhead_is_at_least_one(tmp_path: Path) -> None:
    line = checked(federation.overhead(values(tmp_path)), "overhead")
    assert isinstance(line["ratio"], float)
    assert line["ratio"] > 1


@pytest.mark.e2e
def test_bytes_up_are_those_of_the_groups_that_each_stream_trains(tmp_path: Path) -> None:
    path = write_config(tmp_path, values(tmp_path))
    line = checked(federation.bytes_up(path), "bytes_up")
    experiment = config.load(path)
    whole = central.parameters_of(central.initial_model(experiment, central.Tokenizer.load()))
    sent = full = 0
    for stage in experiment.stages:
        for site in config.sites_of(stage, experiment.data.sites):
            reached = for_stream(whole, site.stream)
            sent += stage.rounds * num_bytes(reached.values())
            full += stage.rounds * num_bytes(whole.values())
    assert line["value"] == pytest.approx(sent, rel=0.2)  # headers of 128 bytes weigh in a model as small as this
    assert isinstance(line["ratio"], float)
    assert line["ratio"] == pytest.approx(full / sent, rel=0.2)
    assert line["ratio"] > 1


@pytest.mark.slow
def test_engines_are_measured_side_by_side_on_runs_that_end_well() -> None:
    line = checked(federation.vs_ray(TINY), "vs_ray")
    assert isinstance(line["ratio"], float)
    assert isinstance(line["value"], float)
    assert line["ratio"] > 0
    assert line["value"] > 0


@pytest.mark.e2e
def test_server_memory_is_what_the_process_held_beyond_its_allowance() -> None:
    line = checked(federation.server_memory(TINY), "server_memory")
    assert isinstance(line["ratio"], float)
    assert isinstance(line["value"], int)
    assert line["value"] > 100 << 20  # torch alone
    assert line["ratio"] == pytest.approx((line["value"] - (512 << 20)) / 80_000, abs=1e-3)


@pytest.mark.slow
def test_nvflare_does_the_same_work() -> None:
    line = checked(federation.vs_nvflare(TINY), "vs_nvflare")
    assert line["ratio"] is None or nvflare.VERSION in str(line["against"])


@pytest.mark.e2e
def test_a_run_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"the bench's run on sequential failed: .*cannot write the run folder"):
        trivial.run("sequential", TINY, tmp_path / "run")
