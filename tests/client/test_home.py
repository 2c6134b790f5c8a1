"""A site's home: its key, its settings, and who may read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client import home
from client.home import Home, Settings
from fedmix.errors import ConfigError


def made(folder: Path, **changes: object) -> Home:
    settings = Settings.model_validate({"name": "west", "coordinator": "link.example:9092", "shard": "shards/west"} | changes)
    return home.create(folder / "site", settings, b"certificate")


def test_a_new_home_has_a_key_that_flower_takes_and_only_its_owner_reads(tmp_path: Path) -> None:
    site = made(tmp_path)
    private = load_ssh_private_key(site.key.read_bytes(), None)
    public = load_ssh_public_key(site.public_key.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert site.key.stat().st_mode & 0o777 == 0o600
    assert site.secret.stat().st_mode & 0o777 == 0o600
    assert site.folder.stat().st_mode & 0o077 == 0
    assert site.policy().max_rounds == 1000
    assert not site.is_paused


def test_a_shards_place_is_meant_from_the_home(tmp_path: Path) -> None:
    site = made(tmp_path)
    assert site.settings().shard == site.folder / "shards/west"
    assert (site.settings().host, site.settings().link_port) == ("link.example", 9092)


def test_a_home_is_never_made_anew_over_another(tmp_path: Path) -> None:
    key = made(tmp_path).key.read_bytes()
    with pytest.raises(ConfigError, match="is a site's home already"):
        made(tmp_path)
    assert (tmp_path / "site" / "key").read_bytes() == key


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "cannot be read: No such file"),
        ("name: West", "wrong at name"),
        ("name: west\ncoordinator: link.example\nshard: a", "wrong at coordinator"),
        ("name: west\ncoordinator: a:1\nshard: a\nproxy: b", "wrong at proxy"),
    ],
)
def test_settings_that_are_wrong_are_said_without_the_folder(text: str | None, cause: str, tmp_path: Path) -> None:
    site = made(tmp_path)
    site.settings_file.unlink() if text is None else site.settings_file.write_text(text)
    with pytest.raises(ConfigError, match=cause) as caught:
        site.settings()
    assert str(tmp_path) not in str(caught.value)


def test_a_kill_switch_that_cannot_be_looked_at_is_on(tmp_path: Path) -> None:
    site = made(tmp_path)
    site.paused_file.symlink_to("nowhere")
    assert site.is_paused
    assert Home(tmp_path / "gone").is_paused


def test_a_denied_list_that_cannot_be_read_allows_nothing(tmp_path: Path) -> None:
    site = made(tmp_path)
    assert site.denied() == set()
    site.denied_file.mkdir()
    with pytest.raises(ConfigError, match="list of denied plans cannot be read"):
        site.denied()
