"""The plan of a secure sum names each site's registered key."""

from __future__ import annotations

from pathlib import Path

import pytest
from little import SITES, everyone, write_config

from client import home as homes
from fedmix import config
from fedmix.errors import ConfigError
from server import coordinator, planning
from server.home import Home, Settings


def test_a_plan_of_a_secure_sum_waits_for_every_site_s_key_and_names_it(tmp_path: Path) -> None:
    hub = Home(tmp_path / "hub")
    coordinator.init(hub, Settings(host="localhost", listen="127.0.0.1", port=9443, control_port=9444, health_port=9445))
    wanted = everyone(Path("phantoms"), aggregation={"clip": None}, secure_sum={"threshold": 2})
    experiment = config.load(write_config(tmp_path, wanted))
    keys = {}
    for name in SITES:
        with pytest.raises(ConfigError, match=r"names each site's key, and .*west is not registered"):
            planning.make_plan(hub, experiment, SITES, out=tmp_path / "early.yaml", valid_days=3)
        settings = homes.Settings(name=name, coordinator="localhost:9443", shard=tmp_path)
        made = homes.create(tmp_path / name, settings, b"no certificate")
        hub.register(name, made.public_key)
        keys[name] = " ".join(made.public_key.read_text().split()[:2])
    plan = planning.make_plan(hub, experiment, SITES, out=tmp_path / "plan.yaml", valid_days=3)
    assert plan.plan.keys == keys
    assert not (tmp_path / "early.yaml").exists()
