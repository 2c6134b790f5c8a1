"""An experiment with a secure sum: what does not go with it is named, and without it nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest

from fedmix import config
from fedmix.errors import ConfigError


def summing(
    secure: dict[str, Any] | None = None, *, sites: int = 3, stage: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A smallest experiment of image sites with a secure sum."""
    phantom = {"studies": 8, "look": "north"}
    return {
        "name": "summing",
        "data": {
            "sites": [{"name": f"site{number}", "stream": "image", "phantom": phantom} for number in range(sites)],
            "held_out": {"phantom": phantom | {"look": "unseen"}},
        },
        "stages": [{"name": "all", "rounds": 1} | (stage or {})],
        "aggregation": {"clip": None},
        "secure_sum": {"threshold": 2} | (secure or {}),
    } | changes


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (summing(wire={"coding": "int8"}), r"does not go with wire.coding = int8, .* set it to float32"),
        (summing(wire={"keep": 0.5}), r"wire.keep = 0.5, .* set it to 1"),
        (summing(aggregation={"clip": None, "combine": "median"}), r"aggregation.combine = median, .* set it to mean"),
        (summing(aggregation={}), r"aggregation.clip = 3.0, .* set it to null"),
        (summing(aggregation={"clip": None, "rule": "fedcola"}), "gives sites of a sum no weight"),
        (summing(aggregation={"clip": None, "shared_mix": {"image": 0.0, "text": 1.0}}), "shared_mix"),
        (summing(stage={"optimiser": {"second_moment": "aggregated"}}), "set it to own"),
        (summing({"threshold": 1}), "greater than or equal to 2"),
        (summing({"bits": 25}), "less than or equal to 24"),
        (summing(sites=4), r"has 4 sites, 4 of which a round asks, so secure_sum.threshold should be from 3 to 4, it is 2"),
        (summing({"threshold": 3}, federation={"participation": 0.5}), r"2 of which a round asks, .* from 2 to 2, it is 3"),
        (summing({"threshold": 4}), r"threshold should be from 2 to 3, it is 4"),
    ],
)
def test_what_needs_to_see_each_site_s_update_is_named(wanted: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.build(wanted)


def test_the_fingerprint_covers_a_secure_sum_and_is_the_old_one_without() -> None:
    plain = config.build(summing(secure_sum=None)).fingerprint()
    assert plain == config.build({key: value for key, value in summing().items() if key != "secure_sum"}).fingerprint()
    found = {config.build(summing(one)).fingerprint() for one in ({}, {"threshold": 3}, {"clip": 0.5}, {"bits": 16})}
    assert len(found | {plain}) == 5
