"""What a real hospital refuses: a plan not approved, one that was changed, a job that answers with more than an update."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import smuggling
from federations import START_S, Federation, Program, federation
from little import World, everyone, waited_until

from fedmix.deployment import plan as plans
from server.home import Home
from server.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ENDED_S = 30.0  # so soon after a site's refusal the run is over
# Imported by every Python that finds it on its path; the one that answers messages is to be hostile.
HOSTILE = """
import sys
if "clientapp" in sys.orig_argv:
    import smuggling
    smuggling.begin()
"""


def refusals(made: Federation, name: str) -> list[str]:
    """Why a hospital refused, as its ledger has it."""
    return [entry["why"] for entry in made.entries(name) if entry["event"] == "refused"]


def failed(made: Federation, program: Program, before: int) -> float:
    """Wait until north has refused once more, and the run has failed; returns the seconds in between."""
    waited_until(lambda: len(refusals(made, "north")) > before, START_S)
    began = time.monotonic()
    assert program.ended(ENDED_S) == 1
    return time.monotonic() - began


def words(program: Program) -> str:
    """What a program said, however it was broken into lines."""
    return " ".join(program.said().split())


def test_a_hospital_refuses_what_it_did_not_approve_and_what_is_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = everyone(tmp_path, federation={"deadline_s": 300.0, "max_failed_rounds": 10})
    world = World(tmp_path / "here", wanted)
    with federation(tmp_path / "there", world, wanted) as made:
        plan = made.found(sites=("north",))
        kept = made.folder / "north/plans" / f"{plans.digest(plan)}.yaml"
        approved = kept.read_bytes()
        at = ("--coordinator", Home(made.hub).settings().address, "--ca", made.hub / "ca.crt", "--shard", world.shards["south"])
        made.site("south", "init", "south", *at)
        made.server("register", "south", "--key", made.folder / "south/key.pub")
        (made.folder / "sitecustomize.py").write_text(HOSTILE)
        (made.folder / "turns").touch()
        made.serve()
        with monkeypatch.context() as patch:
            patch.setenv(smuggling.TURNS, str(made.folder / "turns"))
            own = [str(made.folder), str(Path(smuggling.__file__).parent), os.environ.get("PYTHONPATH", "")]
            patch.setenv("PYTHONPATH", os.pathsep.join(own))
            made.join("north")
        made.join("south")
        waited_until(lambda: made.online() == {"north", "south"}, START_S)
        run = ("server", "run", plan, "--home", made.hub)

        kept.unlink()
        first = made.start("unapproved.log", *run)
        print(f"unapproved: over {failed(made, first, 0):.1f} s after the refusal")
        assert "is not approved at this site; send it there for `fedmix site review`" in words(first)
        kept.write_bytes(approved.replace(b"name: little", b"name: Little"))
        before = refusals(made, "north")
        second = made.start("changed.log", *run, "--resume")
        print(f"changed: over {failed(made, second, len(before)):.1f} s after the refusal")
        assert "was changed at this site after it was approved; approve the plan anew" in words(second)
        assert {entry["event"] for entry in made.entries("north")} == {"created", "approved", "started", "received", "refused"}

        kept.write_bytes(approved)
        before = refusals(made, "north")
        last = made.start("hostile.log", *run, "--resume")
        assert last.ended() == 0, last.said()
        tried = refusals(made, "north")[len(before) :]
        assert len(tried) == len(smuggling.TRIED)
        assert "the reply holds fields that nobody asked for" in tried[0]
        assert "the reply holds an array with more than numbers in it" in tried[3]
        assert all(why in words(last) for why in tried)
        left = [entry["kind"] for entry in made.entries("north") if entry["event"] == "sent"]
        assert left == ["query", "train"]  # the greeting, and the one honest update
        for text in ((made.folder / "north/ledger.jsonl").read_text(), (made.hub / "ledger.jsonl").read_text(), last.said()):
            assert "effusion" not in text
        assert [entry["event"] for entry in made.entries("south")] == ["created", "started"], "a site not on the list was asked"
        made.site("north", "audit", "verify", "--peer", made.hub / "ledger.jsonl")
        assert RunStore(made.hub / "runs/little", plans.read(plan).resolved(), resume=True).latest() is not None
