"""How far sites' answers have come, as it is told to the coordinator."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from superlinks import Sending

from server import arrivals, coordinator, standing
from server.home import Home, Settings

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's way to Alembic


def test_how_much_has_come_is_told_from_outside_in_bytes_and_parts(tmp_path: Path) -> None:
    west = Sending(tmp_path / "state.db")
    came = 0
    for number, (name, content) in enumerate(west.objects.items()):
        found = arrivals.arrivals(west.database)["west"]
        assert (found.num_bytes, found.share) == (came, pytest.approx(number / len(west.objects)))
        west.push(name)
        came += len(content)
    assert arrivals.arrivals(west.database) == {}, "it is whole"


def test_a_coordinators_status_tells_what_is_on_its_way(tmp_path: Path) -> None:
    home = Home(tmp_path)
    coordinator.init(home, Settings(host="localhost", listen="127.0.0.1", port=9443, control_port=9444, health_port=9445))
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    (tmp_path / "key.pub").write_bytes(public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    home.register("west", tmp_path / "key.pub")
    west = Sending(home.database)
    west.push(west.tree.object_id)
    (site,) = standing.standing(home).sites
    assert site.arrival == arrivals.arrivals(home.database)["west"]
    assert str(site.arrival).startswith("0.0 MB, ")


def test_without_a_database_nothing_is_on_its_way(tmp_path: Path) -> None:
    assert arrivals.arrivals(tmp_path / "none.db") == {}
    (tmp_path / "empty.db").touch()
    assert arrivals.arrivals(tmp_path / "empty.db") == {}


def test_the_watcher_hears_of_each_site_for_as_long_as_it_sends() -> None:
    now, said = [0.0], list[str]()
    arriving = arrivals.Arriving(said.append, clock=lambda: now[0])
    for megabytes in (1, 2, 3):
        arriving.update({"west": arrivals.Arrival(megabytes * 1_000_000, megabytes / 4)})
        now[0] += 40.0
    arriving.update({})
    arriving.update({"west": arrivals.Arrival(0, 0.0)})
    assert said == [
        "west: of its answer has come 2.0 MB, 50 % at 0.05 MB/s, about 40 s to go",
        "west: of its answer has come 3.0 MB, 75 % at 0.04 MB/s, about 27 s to go",
    ]
