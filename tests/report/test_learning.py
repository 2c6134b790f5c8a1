"""The curves of the central evaluation: what they are of, and in the unit of the headline."""

from __future__ import annotations

import inspect

from fedmix.evaluation import suite
from fedmix.report import learning
from fedmix.report.history import Entry, History


def test_recall_is_in_percent_with_its_direction_as_in_the_headline() -> None:
    entries = tuple(Entry("evaluation", "paired", number, None, {"retrieval/r@10": 0.1 * number}) for number in (1, 5))
    (panel,) = learning.central(History(entries)).panels
    assert panel.title == "R@10, mean of both directions, %"
    assert [end.text for end in panel.ends] == ["50.0"]


def test_the_text_says_how_many_studies_the_curves_are_of() -> None:
    drawn = inspect.signature(suite.quick).parameters["num_studies"].default
    assert f"same {drawn} test studies" in learning.central(History()).about
