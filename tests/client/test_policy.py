"""The hospital's policy file: what is not wholly understood allows nothing."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from client import policy
from client.policy import Hours, Policy
from fedmix import config
from fedmix.errors import ConfigError, PolicyError


def read(folder: Path, text: str) -> Policy:
    path = folder / "policy.yaml"
    path.write_text(text)
    return policy.read(path)


def test_the_default_file_says_the_defaults(tmp_path: Path) -> None:
    text = policy.default_text()
    assert read(tmp_path, text) == Policy()
    assert {f"{name}:" for name in Policy.model_fields} <= {line.split(" ")[0] for line in text.splitlines()}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("norm: 3", "wrong at norm: extra inputs"),
        ("max_norm: -1", "wrong at max_norm"),
        ("max_norm: .nan", "wrong at max_norm"),
        ("hours: {begin: 25}", r"wrong at hours\.begin"),
        ("records: [reports]", r"wrong at records\.0"),
        ("3", "wrong at its top"),
        ("a: [", "is not YAML"),
        ("x: !!python/object/apply:os.system [id]", "is not YAML"),
        ("#" * (1 << 21), "it has at most"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        read(tmp_path, text)
    assert str(tmp_path) not in str(caught.value)


def test_hours_may_pass_midnight() -> None:
    assert [hour for hour in range(24) if Hours(begin=22, end=3).hold(hour)] == [0, 1, 2, 22, 23]
    assert [hour for hour in range(24) if Hours(begin=8, end=10).hold(hour)] == [8, 9]
    assert all(Hours().hold(hour) for hour in range(24))
    with pytest.raises(PolicyError, match="from 8 to 10 o'clock"):
        Policy(hours=Hours(begin=8, end=10)).check_hour(datetime(2026, 1, 1, 10, 0))


def test_patterns_name_groups_and_metrics() -> None:
    some = Policy(groups=("block*.image", "image.*"), metrics=("mvm/*",))
    some.check_names({"deltas"}, {"block0.image", "image.embedding"}, {"mvm/loss"})
    with pytest.raises(PolicyError, match=r"does not let block0\.text, text\.embedding leave"):
        some.check_names({"deltas"}, {"text.embedding", "block0.text"}, ())
    with pytest.raises(PolicyError, match="1 of the reply's metrics"):
        some.check_names({"deltas"}, (), {"mvm/loss", "mlm/loss"})


@pytest.mark.parametrize("mode", ["dp", "noisy_updates", "central_noise"])
def test_a_mode_that_is_asked_for_is_that_of_the_plan(mode: str) -> None:
    asking = Policy.model_validate({"privacy": {"mode": mode, "epsilon": 3.0}})
    for offered in ("dp", "noisy_updates", "central_noise"):
        plan = config.Privacy(mode=offered, epsilon=2.0)  # type: ignore[arg-type]
        if offered == mode:
            asking.check_privacy(plan)
            continue
        with pytest.raises(PolicyError, match="which the plan does not have"):
            asking.check_privacy(plan)
