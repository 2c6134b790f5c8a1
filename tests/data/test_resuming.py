"""A preparation that is killed, wherever that is, and started again ends with the bytes of one that was not."""

import csv
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from multiprocessing import forkserver

import numpy as np
import pytest
from deaths import Death, died, ended, forked
from little import ROOT, waited_until
from PIL import Image
from radiographs import file_of, marked

from fedmix.data import shard_writer
from fedmix.data.characteristics import AGE_BANDS
from fedmix.data.images import ImageOptions
from fedmix.data.journal import Journal
from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.data.prepare import PrepareOptions, prepare
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))
NUM_ROWS = 30
COLUMNS = ("image", "text", "patient_id", "study_id", "labels", "split", "lang", "sex", "age")


@pytest.fixture(scope="module", autouse=True)
def often():
    """Every few rows are seen to the disk, as else some hundred are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_FLUSH_STUDIES", 4)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


class Site:
    """A table in which something is wrong with every third row, and a way to prepare it again and again."""

    def __init__(self, root, tokenizer, layout="table", reports=None):
        self.root, self.tokenizer, self.layout, self.reports = root, tokenizer, layout, reports

    def prepare(self, out, key=KEY, **options):
        """What was told of the progress, and the summary."""
        heard = []
        source = open_source(self.layout, self.root, SourceOptions(reports=self.reports))
        usual = {"image": ImageOptions(size=24), "max_bad_share": 1.0, "keeps_characteristics": True}
        given = PrepareOptions(**{**usual, **options})
        summary = prepare(
            source,
            out,
            options=given,
            tokenizer=self.tokenizer,
            key=key,
            workers=2,
            on_progress=lambda done, _: heard.append(done),
        )
        return heard, summary

    def is_killed(self, out, death):
        """Whether it died before it was done."""
        return died(lambda: in_a_fork(lambda: self.prepare(out)), out.parent, death)


def in_a_fork(job):
    """Let a fork of this process use its fork server, which Python takes for dead there: it is no child of the fork's."""
    known, wait = forkserver._forkserver._forkserver_pid, os.waitpid
    os.waitpid = lambda pid, options: (0, 0) if pid == known else wait(pid, options)
    job()


@pytest.fixture(scope="module")
def site(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("site")
    rows = []
    for number in range(NUM_ROWS):
        image = np.random.default_rng(number).integers(0, 256, (30, 40), dtype=np.uint8)
        Image.fromarray(image).save(root / f"{number}.png")
        text = f"Study {number}. Heart size is normal. " * (number % 4)
        split = "test" if number % 7 == 3 else "train"
        rows.append([f"{number}.png", text, f"p{number // 2}", str(number), "Edema" * (number % 2), split, "en" * (number % 3)])
        rows[-1][6] = rows[-1][6][:2]
        rows[-1] += ["FM"[number % 2], 3 * number]
    rows[4][0], rows[11][0], rows[12][2] = "none.png", "../out.png", ""
    rows[20][1] = "Seen on 2024-03-05."
    write_rows(root, rows)
    return Site(root, tokenizer)


def write_rows(root, rows):
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def read_rows(root):
    with open(root / "table.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def whole(site, tmp_path_factory):
    """The bytes of a preparation that was let be."""
    out = tmp_path_factory.mktemp("whole") / "shard"
    _, summary = site.prepare(out)
    assert len(summary.quarantined) > 3
    shard = Shard.open(out)
    assert (set(shard.sex), set(shard.age_band)) == ({"F", "M"}, {"0-17", "18-39", "40-59", "60-79", "80+"})
    return folder_bytes(out)


def folder_bytes(path):
    return {member.name: member.read_bytes() for member in sorted(path.iterdir())}


def deaths(count, seed):
    """Before calls to the file system, and in the midst of writes, where nobody chose them."""
    chance = random.Random(seed)
    for number in range(count):
        if number % 2:
            yield Death("call", chance.randrange(45))
        else:
            yield Death("write", chance.randrange(30), chance.choice((50, 700, 3000, 9000)))


def go_on(site, out, whole):
    """Prepare again; how many rows had not to be done again."""
    journal = out.parent / f".{out.name}.partial" / "journal.jsonl"
    if out.exists() and not (journal.exists() and journal.stat().st_size):  # done, but for removing a folder
        heard = [NUM_ROWS]
        with pytest.raises(DataError, match="already"):
            site.prepare(out)
    else:
        heard, _ = site.prepare(out)
    assert folder_bytes(out) == whole
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]
    return heard[0] if heard[0] > 1 else 0


def kill_and_go_on(site, out, whole, count, seed):
    saved = []
    for number, death in enumerate(deaths(count, seed)):
        (out / str(number)).mkdir(parents=True)
        place = out / str(number) / "shard"
        assert site.is_killed(place, death), death
        saved.append(go_on(site, place, whole))
    return saved


def test_killed_and_started_again_it_ends_with_the_same_bytes(site, tmp_path, whole):
    saved = kill_and_go_on(site, tmp_path, whole, 5, seed=1)
    assert max(saved) > 3


@pytest.mark.slow
def test_killed_at_many_points_it_ends_with_the_same_bytes(site, tmp_path, whole):
    saved = kill_and_go_on(site, tmp_path, whole, 20, seed=2)
    assert len(set(saved)) > 5


@pytest.mark.slow
def test_killed_before_every_call_to_the_file_system_it_ends_with_the_same_bytes(site, tmp_path, whole):
    after = 0
    while True:
        (tmp_path / str(after)).mkdir()
        place = tmp_path / str(after) / "shard"
        if not site.is_killed(place, Death("call", after)):
            break
        go_on(site, place, whole)
        after += 1
    assert after > 40


def test_killed_again_and_again_it_still_gets_there(site, tmp_path, whole):
    place = tmp_path / "shard"
    kills = 0
    while site.is_killed(place, Death("call", 10 + 4 * kills)):
        kills += 1
    assert kills > 3
    assert folder_bytes(place) == whole


@pytest.fixture
def interrupted(site, tmp_path):
    """A preparation that was killed when most rows were done."""
    place = tmp_path / "out" / "shard"
    place.parent.mkdir()
    assert site.is_killed(place, Death("call", 26))
    return place


@pytest.mark.parametrize(
    "change",
    [
        {"max_words": 9},
        {"image": ImageOptions(size=32)},
        {"phi": "count"},
        {"keeps_characteristics": False},
        {"key": bytes(32)},
    ],
)
def test_other_options_or_another_key_are_refused_until_it_starts_over(site, interrupted, change):
    with pytest.raises(DataError, match=r"other options, another key or another tokenizer; .*--fresh"):
        site.prepare(interrupted, **change)
    heard, _ = site.prepare(interrupted, **change, fresh=True)
    assert heard == list(range(1, NUM_ROWS + 1))


def test_what_changes_no_byte_may_be_another(site, interrupted, whole):
    heard, summary = site.prepare(interrupted, max_bad_share=0.9, replace=True)
    assert 3 < heard[0] < NUM_ROWS
    assert f"Went on behind {heard[0]} rows that an interrupted preparation had done." in summary.notes
    assert folder_bytes(interrupted) == whole


def test_counts_are_those_of_a_preparation_that_was_let_be(site, interrupted, tmp_path):
    _, went_on = site.prepare(interrupted)
    _, at_once = site.prepare(tmp_path / "at once")
    for name in ("rows", "written", "splits", "num_patients", "quarantined", "shown_rows", "phi"):
        assert getattr(went_on, name) == getattr(at_once, name), name


@pytest.mark.parametrize("what", ["cell", "file", "rows"])
def test_data_that_has_changed_is_refused_until_it_starts_over(site, interrupted, tmp_path, what):
    changed = Site(tmp_path / "changed", site.tokenizer)
    changed.root.mkdir()
    for path in site.root.iterdir():
        (changed.root / path.name).write_bytes(path.read_bytes())
        os.utime(changed.root / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    rows = read_rows(changed.root)
    if what == "cell":
        rows[2][1] = "Another text."
    elif what == "file":
        (changed.root / "0.png").write_bytes((changed.root / "1.png").read_bytes())
    else:
        del rows[3:]
    write_rows(changed.root, rows)
    with pytest.raises(DataError, match=r"data set has changed .* in or before row \d+; .*--fresh"):
        changed.prepare(interrupted)
    assert changed.prepare(interrupted, fresh=True)[0][0] == 1


def test_a_data_set_that_makes_no_shard_leaves_nothing_to_go_on_with(site, tmp_path):
    with pytest.raises(DataError, match="mend the data, or allow a larger share"):
        site.prepare(tmp_path / "shard", max_bad_share=0.01)
    assert list(tmp_path.iterdir()) == []


def test_arrays_shorter_than_the_journal_says_are_refused(site, interrupted):
    images = interrupted.parent / ".shard.partial" / "shard" / "images.npy"
    os.truncate(images, images.stat().st_size // 2)
    with pytest.raises(DataError, match="damaged; start over with --fresh"):
        site.prepare(interrupted)


def test_only_one_process_prepares_a_shard(site, tmp_path, interrupted):
    with open(interrupted.parent / ".shard.partial" / "journal.jsonl", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process prepares this very shard"):
            site.prepare(interrupted)
    site.prepare(interrupted)


def test_nothing_that_is_kept_for_going_on_names_a_patient(site, interrupted):
    journal = (interrupted.parent / ".shard.partial" / "journal.jsonl").read_text()
    assert len(journal.splitlines()) > 10
    assert not [row for row in read_rows(site.root) if row[0] in journal or (row[2] and f'"{row[2]}"' in journal)]
    assert "Study" not in journal
    said = [tuple(line[-2:]) for line in map(json.loads, journal.splitlines()) if line[0] == "study"]
    assert {sex for sex, _ in said} == {"F", "M"}
    assert {band for _, band in said} <= set(AGE_BANDS)  # a band, and no age


def test_an_older_shard_is_there_before_and_after_a_kill_in_the_midst_of_replacing_it(site, tmp_path, tokenizer):
    goal = tmp_path / "shard"
    site.prepare(goal, max_words=9)
    older = folder_bytes(goal)

    def replaced():
        journal = Journal(goal, "other")
        journal._goal.rename(journal._older)

    assert ended(forked(replaced, tmp_path)) == 0
    assert not goal.exists()
    with pytest.raises(DataError, match="already"):
        site.prepare(goal)
    assert folder_bytes(goal) == older


@pytest.mark.e2e
def test_the_command_killed_while_it_works_goes_on_when_it_is_given_again(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [["", f"Study {number}. Normal.", f"p{number}", str(number), "", "train", "", "", ""] for number in range(6000)]
    write_rows(tmp_path / "data", rows)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-c",
        "from fedmix.cli import main; main()",
        "prepare",
        "table",
        "data",
        "--workers",
        "1",
        "--out",
    ]
    running = subprocess.Popen([*command, "shard"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".shard.partial" / "journal.jsonl"
    waited_until(lambda: journal.exists() and journal.stat().st_size > 20_000, 60)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "shard").exists()
    for out in ("shard", "at-once"):
        said = subprocess.run([*command, out], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stderr
        assert ("Went on behind" in said.stdout) == (out == "shard")
    assert folder_bytes(tmp_path / "shard") == folder_bytes(tmp_path / "at-once")


def test_dicom_files_with_reports_go_on_too(tmp_path, tokenizer):
    root = tmp_path / "root"
    root.mkdir()
    for number in range(12):  # two images to a study, of which one stands beside the report
        tags = {"PatientID": f"p{number // 4}", "StudyInstanceUID": f"1.2.{number // 2}", "SOPInstanceUID": f"1.2.3.{number}"}
        (root / f"{number:02}.dcm").write_bytes(file_of(marked() + number, **tags))
    reports = tmp_path / "reports.csv"
    reports.write_text("StudyInstanceUID,report\n" + "".join(f"1.2.{number},Normal {number}.\n" for number in range(6)))
    site = Site(root, tokenizer, "dicom", reports)
    _, summary = site.prepare(tmp_path / "whole")
    assert summary.quarantined == {"image_extra": 6}
    place = tmp_path / "out" / "shard"
    place.parent.mkdir()
    assert site.is_killed(place, Death("call", 16))
    heard, went_on = site.prepare(place)
    assert 1 < heard[0] < 12
    assert folder_bytes(place) == folder_bytes(tmp_path / "whole")
    assert went_on.quarantined == summary.quarantined
    assert json.loads((place / "shard.json").read_text())["num_studies"] == len(Shard.open(place)) == 6
