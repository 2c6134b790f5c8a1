"""Workers that crash, hang or grow are replaced, their file is refused, and every other answer stands where it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from little import ROOT, is_running, waited_until
from misdeeds import do, lie
from radiographs import file_of, marked

from fedmix.data import dicom
from fedmix.data.images import ImageOptions, read_image
from fedmix.data.layouts.records import Picture
from fedmix.data.pictures import PictureReader
from fedmix.data.quarantine import RefusedError
from fedmix.data.walls import Limits, Walls
from fedmix.errors import DataError

TIGHT = Limits(memory_bytes=256 << 20, cpu_s=2.0, wall_s=10.0)


def outcome(answer):
    return answer.code if isinstance(answer, RefusedError) else answer.decode()


def outcomes(jobs, workers=2):
    with Walls(do, workers=workers, limits=TIGHT) as walls:
        return [outcome(answer) for answer in walls.map(jobs)]


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_a_worker_dies_of_is_a_code_and_the_order_is_kept(workers):
    odd = {
        3: "crash",
        7: "leave",
        12: "grow",
        13: "refuse",
        21: "break",
        22: "crash",
        23: "crash",
        30: "write",
        33: "hang",
        37: "spin",
    }
    jobs = [(odd.get(number, "answer"), 512 if number == 12 else number) for number in range(40)]
    wanted = {
        "crash": "decoder_crashed",
        "leave": "decoder_crashed",
        "grow": "decoder_memory",
        "refuse": "image_blank",
        "break": "decoder_crashed",
        "write": "decoder_crashed",
        "hang": "decoder_timeout",
        "spin": "decoder_timeout",
    }
    started = time.monotonic()
    assert outcomes(jobs, workers) == [wanted[odd[number]] if number in odd else str(number) for number in range(40)]
    assert time.monotonic() - started < 60


def test_several_threads_may_ask_and_each_gets_its_own_answer():
    with Walls(do, workers=2, limits=TIGHT) as walls, ThreadPoolExecutor(4) as threads:
        jobs = [("crash" if number % 7 == 3 else "answer", number) for number in range(30)]
        answers = [outcome(answer) for answer in threads.map(walls.ask, jobs)]
    assert answers == ["decoder_crashed" if what == "crash" else str(number) for what, number in jobs]


def test_memory_below_the_limit_is_given():
    with Walls(do, workers=1, limits=TIGHT) as walls:
        (answer,) = walls.map([("grow", 20)])
    assert isinstance(answer, bytes)
    assert len(answer) == 20 << 20


def test_workers_say_nothing_and_a_good_one_is_kept(capfd):
    jobs = [("pid", 0), ("print", 0), *[("pid", 0)] * 10]
    pids = outcomes(jobs, workers=1)
    assert len({pid for pid in pids if pid != "0"}) == 1
    assert capfd.readouterr() == ("", "")


def test_no_worker_is_left_when_the_walls_come_down_early():
    with Walls(do, workers=2, limits=TIGHT) as walls:
        answers = walls.map([("pid", 0) if number < 8 else ("hang", 0) for number in range(100)])
        pids = {int(outcome(next(answers))) for _ in range(8)}
    waited_until(lambda: not any(map(is_running, pids)), 5)


def test_a_worker_that_dies_between_two_files_is_replaced_without_blame():
    with Walls(do, workers=1, limits=TIGHT) as walls:
        (first,) = walls.map([("pid", 0)])
        pid = int(outcome(first))
        os.kill(pid, signal.SIGKILL)
        waited_until(lambda: not is_running(pid), 5)
        (second,) = walls.map([("pid", 0)])
    assert outcome(second).isdecimal()
    assert int(outcome(second)) != pid


ORPHANING = """
import os, sys
from misdeeds import do
from fedmix.data.walls import Limits, Walls
if __name__ == "__main__":
    walls = Walls(do, workers=1, limits=Limits(wall_s=1.0))
    print(next(walls.map([("pid", 0)])).decode(), flush=True)
    walls._workers[0]._connection.send([("sleep", 600)])
    os._exit(0)
"""


def test_a_worker_without_a_parent_ends_by_itself(tmp_path):
    """The parent is gone in the middle of a file; its worker, in C code for all anyone knows, is ended by its alarm."""
    script = tmp_path / "orphaning.py"
    script.write_text(ORPHANING)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    waited_until(lambda: not is_running(int(ended.stdout)), 10)


def test_what_a_worker_sends_is_measured_before_it_is_believed(tmp_path):
    reader = PictureReader(tmp_path, ImageOptions(size=32), frozenset({"PA"}))
    given, asked = Picture(("a",), view="PA"), Picture(("a",), view=None)
    header = dicom.read_header(file_of(marked())).to_bytes()
    for picture, wrong in (
        (given, b""),
        (given, b"\n" + bytes(1023)),
        (given, header + b"\n" + bytes(1024)),
        (asked, b"\n" + bytes(1024)),
        (asked, header + b"\n" + bytes(1025)),
        (asked, b"{}\n" + bytes(1024)),
    ):
        with pytest.raises(RefusedError, match="process that decoded the file died"):
            reader.received(picture, wrong)
    with Walls(lie, workers=1, limits=TIGHT) as walls:
        (answer,) = walls.map([bytes(33 << 20)])
    assert outcome(answer) == "decoder_crashed"


def test_squares_and_headers_from_behind_the_walls_are_those_from_before_them(tmp_path):
    options = ImageOptions(size=32)
    files = {f"{number}.dcm": file_of(marked() + number) for number in range(6)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    reader = PictureReader(tmp_path, options, frozenset({"PA"}))
    pictures = [Picture((name,), view=None) for name in (*files, "missing.dcm", "../6.dcm")]
    with Walls(reader, workers=2) as walls:
        *good, missing, outside = walls.map(pictures)
    assert [outcome(missing), outcome(outside)] == ["file_missing", "path_parent"]
    for picture, data, answer in zip(pictures, files.values(), good, strict=False):
        decoded = reader.received(picture, answer)
        assert decoded.header == dicom.read_header(data)
        assert np.array_equal(decoded.image, read_image(data, options))


def test_a_machine_that_cannot_start_a_worker_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr("fedmix.data.walls.START_S", 0.0)
    with (
        pytest.raises(DataError, match="worker process for decoding images could not be started"),
        Walls(do, workers=1, limits=TIGHT) as walls,
    ):
        list(walls.map([("answer", 1)]))
