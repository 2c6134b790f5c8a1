"""The report at the end of a run, whatever the sites' clocks said."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message
from little import SITES, World, everyone

from fedmix.report import html
from fedmix.report.summary import read_report
from server.conclusion import write_report

EVALUATION = {"report": {}, "seconds": 1.0}


def still(reply: Message) -> Message:
    """The same answer from a site whose clock stood while it trained."""
    receipt = reply.content.config_records["receipt"]
    receipt["train_end"] = receipt["train_start"]
    return reply


@pytest.mark.parametrize("is_still", [True, False], ids=["clocks stand", "clocks run"])
def test_a_run_whose_sites_say_that_they_trained_in_no_time_ends_in_a_report_without_that_ratio(
    is_still: bool, tmp_path: Path
) -> None:
    world = World(tmp_path, everyone(tmp_path))
    totals = world.run(world.grid(dict.fromkeys(SITES, still) if is_still else None)).totals
    assert (totals["local_train_s"] == 0) == is_still
    write_report(world.experiment, world.store, EVALUATION, {})
    timing = read_report(world.store.folder).timing
    assert timing.local_train_s == totals["local_train_s"]
    assert (timing.overhead_ratio is None) == is_still
    assert ("The rounds took" in html.write_report(world.store.folder).read_text()) != is_still
