"""Secure sums between both ends: equal to the plain sum whoever drops out, and given up cleanly when anything is not right."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crowd import FAR, SHAPES, Crowd, experiment
from flwr.app import ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size

from fedmix.errors import UpdateError
from fedmix.federation import secure_sum
from fedmix.federation.update import group_of, tower_of
from server.secure import SecureRound

THREE = ("image", "paired", "paired")


@pytest.fixture
def crowd(tmp_path: Path) -> Crowd:
    """Three sites, of which one may drop out."""
    return Crowd(tmp_path, experiment(THREE, threshold=2))


def summed(crowd: Crowd, number: int = 1) -> SecureRound:
    """A round up to the unmasked sums."""
    secure = crowd.round(number)
    failures = crowd.train(secure, secure.agree(crowd.sites), number=number)
    assert not failures
    secure.unmask()
    return secure


@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_the_sum_is_the_plain_one_within_the_step_whoever_drops_out(data: st.DataObject) -> None:
    streams = data.draw(st.lists(st.sampled_from(["image", "text", "paired"]), min_size=3, max_size=10))
    threshold = data.draw(st.integers(len(streams) // 2 + 1, len(streams)))
    names = [f"site{number}" for number in range(len(streams))]
    lost = data.draw(st.lists(st.sampled_from(names), max_size=len(streams) - threshold, unique=True))
    with tempfile.TemporaryDirectory() as folder:
        crowd = Crowd(Path(folder), experiment(streams, threshold=threshold, bits=20))
        for site in lost:
            phase = data.draw(st.sampled_from(["keys", "shares", "train", "unmask"]))
            crowd.silent[phase] = [*crowd.silent.get(phase, ()), site]
        secure = crowd.round()
        agreed = [site.name for site in secure.agree(crowd.sites)]
        assert set(agreed) == set(names) - set(crowd.silent.get("keys", ())) - set(crowd.silent.get("shares", ()))
        assert not crowd.train(secure, [site for site in crowd.sites if site.name in agreed])
        survivors = set(agreed) - set(crowd.silent.get("train", ()))
        helpers = survivors - set(crowd.silent.get("unmask", ()))
        if any(len(helpers & members) < threshold <= len(survivors & members) for members in towers(crowd).values()):
            with pytest.raises(UpdateError, match="helped to unmask"):
                secure.unmask()
            return
        secure.unmask()
        found = dict(secure.changes(SHAPES, FAR))
        for tower, members in towers(crowd).items():
            is_revealed = len(members & survivors) >= threshold
            assert secure.num_sites[tower] == (len(members & survivors) if is_revealed else 0)  # type: ignore[index]
            assert {name for name in SHAPES if tower_of(group_of(name)) == tower} & set(found) == (
                {name for name in SHAPES if tower_of(group_of(name)) == tower} if is_revealed else set()
            )
            if is_revealed:
                for name, plain in crowd.expected(tower, agreed, survivors).items():
                    bound = len(streams) * secure_sum.step_of(crowd.experiment.secure_sum) * 5 + 1e-6  # type: ignore[arg-type]
                    assert np.abs(found[name].numpy() - plain).max() <= bound


def towers(crowd: Crowd) -> dict[str, set[str]]:
    reached = {
        "shared": ("image", "text", "paired"),
        "image": ("image", "paired"),
        "text": ("text", "paired"),
        "pair": ("paired",),
    }
    return {tower: {site.name for site in crowd.sites if site.stream in streams} for tower, streams in reached.items()}


def uniformity(words: np.ndarray[Any, Any]) -> float:
    """Chi-square over the values of the words' bytes, 255 degrees of freedom, in standard deviations from its mean."""
    counts = np.bincount(words.view(np.uint8).reshape(-1), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def test_an_upload_is_uniform_to_who_reads_it(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed seeds of its own mask; 1 in 10,000 uploads is four standard deviations off by chance, a plain one hundreds."""
    size = 40_000
    monkeypatch.setitem(SHAPES, "patch_decoder.weight", Size((size,)))
    for number, site in enumerate(crowd.sites):
        crowd.changes[site.name]["patch_decoder.weight"] = (  # type: ignore[index]
            np.random.default_rng(number).normal(0, 0.1, size).astype(np.float32)
        )
    made = iter(range(10**6))
    monkeypatch.setattr("client.secure.secrets.token_bytes", lambda count: next(made).to_bytes(count, "big"))
    secure = crowd.round()
    crowd.train(secure, secure.agree(crowd.sites))
    words = [said.content.array_records["masked"]["image"].numpy() for phase, _, said in crowd.said if phase == "train"]
    assert len(words) == 3
    for upload in words:
        assert abs(uniformity(upload)) < 4.0
    assert crowd.experiment.secure_sum is not None
    plain, _ = secure_sum.quantise(crowd.changes["site0"]["patch_decoder.weight"], 1 / 3, crowd.experiment.secure_sum)
    assert uniformity(plain) > 1000.0
    assert uniformity(crowd.changes["site0"]["patch_decoder.weight"]) > 1000.0


# ---- what is not right


def in_sum(change: Callable[[ConfigRecord], None]) -> Callable[[Message], Message]:
    """A message to a site with its part of the sum changed."""

    def changed(message: Message) -> Message:
        change(message.content.config_records["sum"])
        return message

    return changed


def in_answer(phase: str, change: Callable[[ConfigRecord], None]) -> Callable[[Message], Message]:
    """A site's answer with the phase's record changed."""

    def changed(message: Message) -> Message:
        if not message.has_error():
            change(message.content.config_records[phase])
        return message

    return changed


def flipped(content: bytes, place: int = -1) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def test_below_the_threshold_nothing_is_asked_for_and_nothing_shown(crowd: Crowd) -> None:
    crowd.silent = {"train": ["site0", "site1"]}
    secure = crowd.round()
    crowd.train(secure, secure.agree(crowd.sites))
    secure.unmask()
    assert not dict(secure.changes(SHAPES, FAR))
    assert [list(said.content.config_records["unmask"]) for phase, _, said in crowd.said if phase == "unmask"] == [[]]


def test_fewer_sites_than_the_threshold_do_not_begin(crowd: Crowd) -> None:
    crowd.silent = {"keys": ["site0"], "shares": ["site1"]}
    with pytest.raises(UpdateError, match="1 sites agreed on a secure sum, 2 are needed"):
        crowd.round().agree(crowd.sites)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said.update({"unmaskd": b""}), None),  # a record's extra field is nobody's tower
        (lambda said: said.update({"shared": said["shared"][:-1]}), "one share of each site"),
        (lambda said: said.update({"shared": [b"", *said["shared"][1:]]}), "one share of each site"),
        (lambda said: said.update({"shared": [flipped(one) for one in said["shared"]]}), r"seed|fit together"),
        (
            lambda said: said.update({"shared": [said["shared"][1], said["shared"][0], *said["shared"][2:]]}),
            r"seed|fit together",
        ),
        (lambda said: said.update({"shared": "text"}), "should be list"),
    ],
)
def test_malformed_or_reordered_shares_give_the_round_up(crowd: Crowd, change: Any, why: str | None) -> None:
    crowd.back = {"unmask": in_answer("unmask", change)}
    if why is None:
        assert dict(summed(crowd).changes(SHAPES, FAR))
        return
    with pytest.raises(UpdateError, match=why):
        summed(crowd)


def test_a_key_whose_shares_are_wrong_is_found(crowd: Crowd) -> None:
    crowd.silent = {"train": ["site1"]}
    crowd.back = {
        "unmask": in_answer("unmask", lambda said: said.update({"shared": [flipped(one, 9) for one in said["shared"]]}))
    }
    with pytest.raises(UpdateError, match=r"seed|key|fit together"):
        summed(crowd)


def refusals(crowd: Crowd) -> dict[str, str]:
    return {name: said.error.reason for _, name, said in crowd.said if said.has_error()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda told: told.update({"signatures": [told["signatures"][1], *told["signatures"][1:]]}), "signature"),
        (lambda told: told.update({"contents": [flipped(told["contents"][0], 40), *told["contents"][1:]]}), r"keys|signature"),
        (
            lambda told: told.update({"contents": told["contents"][:1] * 3, "signatures": told["signatures"][:1] * 3}),
            "twice|signature",
        ),
        (lambda told: told.update({"signers": told["signers"][:2]}), "more keys than signatures"),
    ],
)
def test_a_site_believes_no_keys_that_were_tampered_with(crowd: Crowd, change: Any, why: str) -> None:
    crowd.on_way = {"shares": in_sum(change)}
    with pytest.raises(UpdateError, match="0 sites agreed"):
        crowd.round().agree(crowd.sites)
    assert len(refusals(crowd)) == 3
    assert all(re.search(why, said) for said in refusals(crowd).values())


def test_keys_of_another_attempt_are_refused(crowd: Crowd) -> None:
    crowd.round().agree(crowd.sites)
    old = next(said for phase, name, said in crowd.said if (phase, name) == ("keys", "site1"))
    before = old.content.config_records["keys"]

    def older(told: ConfigRecord) -> None:
        told.update({"contents": [told["contents"][0], before["content"], told["contents"][2]]})  # type: ignore[index]
        told.update({"signatures": [told["signatures"][0], before["signature"], told["signatures"][2]]})  # type: ignore[index]

    crowd.said.clear()
    crowd.on_way = {"shares": in_sum(older)}
    with pytest.raises(UpdateError, match="0 sites agreed"):
        crowd.round().agree(crowd.sites)
    assert "another attempt" in refusals(crowd)["site0"]


def test_a_letter_for_another_site_is_refused(crowd: Crowd) -> None:
    secure = crowd.round()
    agreed = secure.agree(crowd.sites)
    crowd.on_way = {"train": in_sum(lambda told: told.update({"letters": told["letters"][::-1]}))}
    failures = crowd.train(secure, agreed)
    assert failures.keys() == {"site0", "site1", "site2"}
    assert any("changed on the way" in why for why in failures.values())
    secure.unmask()
    assert not dict(secure.changes(SHAPES, FAR))


def test_an_order_is_masked_once(crowd: Crowd) -> None:
    secure = crowd.round()
    agreed = secure.agree(crowd.sites)
    crowd.train(secure, agreed)
    again = next(message for message in crowd.asked if message.metadata.message_type == "train")
    assert "comes a second time" in crowd.answer(again).error.reason
    assert crowd.train(secure, agreed[:1]).keys() == {"site0"}


@pytest.mark.parametrize("phase", ["keys", "shares", "train", "unmask"])
def test_a_message_of_an_earlier_attempt_is_refused(crowd: Crowd, phase: str) -> None:
    summed(crowd)
    old = next(one for one in crowd.asked if one.metadata.message_type.removeprefix("query.") == phase)
    secure = crowd.round()
    secure.agree(crowd.sites)
    if phase != "keys":  # to ask for keys begins an attempt; the one that goes on ends with it
        assert "another attempt" in crowd.answer(old).error.reason
        assert not crowd.train(secure, crowd.sites)
        return
    crowd.answer(old)
    assert len(crowd.train(secure, crowd.sites)) == 1


def test_a_site_reveals_once_and_for_those_who_meant_the_same(crowd: Crowd) -> None:
    secure = crowd.round()
    crowd.train(secure, secure.agree(crowd.sites))
    crowd.on_way = {"unmask": in_sum(lambda told: told.update({"signatures": [b"no signature", *told["signatures"][1:]]}))}  # type: ignore[misc]
    with pytest.raises(UpdateError, match="0 sites helped"):
        secure.unmask()
    crowd.on_way = {}
    secure.unmask()
    message = next(one for one in crowd.asked if one.metadata.message_type == "query.unmask")
    assert "second time" in crowd.answer(message).error.reason


@pytest.mark.parametrize("run_id", ["crowd", "another-run"])
def test_a_round_from_the_same_parameters_is_unmasked_for_the_same_sum_only(crowd: Crowd, run_id: str) -> None:
    """Two sums of the same changes over different sites would show by their difference what one of them sent."""
    first = dict(summed(crowd).changes(SHAPES, FAR))
    crowd.run_id = run_id
    again = dict(summed(crowd).changes(SHAPES, FAR))
    assert all(bool((first[name] == again[name]).all()) for name in first)
    crowd.silent = {"train": ["site2"]}
    with pytest.raises(UpdateError, match="0 sites helped to unmask"):
        summed(crowd)
    assert "the two together could show" in refusals(crowd)["site0"]
    assert dict(summed(crowd, number=2).changes(SHAPES, FAR))  # from other parameters


def test_secrets_are_the_owners_alone_and_gone_when_the_sum_is_shown(crowd: Crowd) -> None:
    secure = crowd.round()
    agreed = secure.agree(crowd.sites)
    file = crowd.folder / "site0" / "crowd" / "secure_sum.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "seeds" in file.read_text()
    crowd.train(secure, agreed)
    secure.unmask()
    assert not file.exists()


def test_a_sum_longer_than_steps_can_lead_gives_the_round_up(crowd: Crowd) -> None:
    with pytest.raises(UpdateError, match="longer than its sites' steps can lead"):
        dict(summed(crowd).changes(SHAPES, dict.fromkeys(FAR, 1e-3)))
