"""The arithmetic of a secure sum: whole steps of a stated range, masks that cancel, and words that show nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation import secure_sum
from fedmix.federation.secure_sum import Member
from fedmix.federation.update import Update
from fedmix.federation.weights import weights_of

WANTED = config.SecureSum(threshold=2, clip=0.5, bits=16)


def changes(seed: int, size: int = 64, scale: float = 0.2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.0, scale, size).astype(np.float32)


@given(
    seed=st.integers(0, 10**6),
    sites=st.integers(1, 10),
    bits=st.integers(8, 24),
    clip=st.floats(1e-3, 1e3, allow_nan=False),
)
@settings(max_examples=40, deadline=None)
def test_a_sum_of_words_is_the_sum_of_values_within_half_a_step_a_site(seed: int, sites: int, bits: int, clip: float) -> None:
    wanted = config.SecureSum(threshold=2, clip=clip, bits=bits)
    weights = np.random.default_rng(seed).dirichlet(np.ones(sites))
    total, plain = np.zeros(64, np.uint32), np.zeros(64)
    for number, weight in enumerate(weights):
        change = changes(seed + number, scale=clip / 3)
        words, clipped = secure_sum.quantise(change, float(weight), wanted)
        assert clipped == (np.abs(change.astype(np.float64)) > clip).sum()
        total += words
        plain += weight * np.clip(change.astype(np.float64), -clip, clip)
    secure_sum.check_range(total, 1.0, sites, wanted)
    found = secure_sum.dequantise(total, 1.0, wanted)
    assert np.abs(found - plain).max() <= (sites / 2 + 1e-3) * secure_sum.step_of(wanted) + 1e-6 * clip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UpdateError, match="not finite"):
        secure_sum.quantise(np.array([0.0, value], np.float32), 1.0, WANTED)


def test_the_ends_of_the_range_and_zero_are_exact() -> None:
    words, clipped = secure_sum.quantise(np.array([0.5, -0.5, 0.0, 7.0, -7.0], np.float32), 1.0, WANTED)
    assert secure_sum.dequantise(words, 1.0, WANTED).tolist() == [0.5, -0.5, 0.0, 0.5, -0.5]
    assert clipped == 2


@given(names=st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=6, unique=True), size=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_shared_masks_cancel_whoever_adds_first(names: list[str], size: int) -> None:
    total = np.zeros(size, np.uint32)
    for site in names:
        for other in names:
            if other != site:
                seed = "".join(sorted((site, other))).ljust(32, ".").encode()
                secure_sum.add_stream(total, seed, secure_sum.sign_of(site, other))
    assert not total.any()


def test_a_stream_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = np.arange(1000, dtype=np.uint32), np.arange(1000, dtype=np.uint32)
    secure_sum.add_stream(whole, bytes(range(32)), 1)
    monkeypatch.setattr(secure_sum, "CHUNK", 7)
    secure_sum.add_stream(pieces, bytes(range(32)), 1)
    assert (whole == pieces).all()
    secure_sum.add_stream(pieces, bytes(range(32)), -1)
    assert (pieces == np.arange(1000)).all()


def test_a_stream_is_aes_256_in_counter_mode() -> None:
    """Its first block is AES-256 of zeros under a key of zeros."""
    words = np.zeros(4, np.uint32)
    secure_sum.add_stream(words, bytes(32), 1)
    assert words.astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    with pytest.raises(UpdateError, match="32 bytes"):
        secure_sum.add_stream(words, bytes(31), 1)


def test_a_sum_that_masks_are_left_on_is_out_of_range() -> None:
    words, _ = secure_sum.quantise(changes(1), 0.5, WANTED)
    secure_sum.check_range(words, 0.5, 1, WANTED)
    secure_sum.add_stream(words, bytes(32), 1)
    with pytest.raises(UpdateError, match="outside the range"):
        secure_sum.check_range(words, 0.5, 1, WANTED)


@pytest.mark.parametrize("rule", ["modality_aware", "modality_exact", "fedavg_all"])
def test_weights_are_those_of_plain_aggregation(rule: str) -> None:
    aggregation = config.Aggregation(rule=rule)  # type: ignore[arg-type]
    members = [Member("a", "image", 40), Member("b", "text", 10), Member("c", "paired", 24), Member("d", "image", 7)]
    names = {"shared": "blocks.0.attention.qkv.weight", "image": "patch_decoder.weight", "text": "word_head.weight"}
    updates = [
        Update(
            one.site,
            {name: None for tower, name in names.items() if tower in secure_sum.towers_of(one.stream)},  # type: ignore[misc]
            {one.stream: one.studies},
            2,
        )
        for one in members
    ]
    plain = weights_of(updates, aggregation)
    for tower, group in {"shared": "block0.attention", "image": "image.decoder", "text": "text.head"}.items():
        assert secure_sum.weights(members, tower, aggregation) == plain[group]  # type: ignore[arg-type]


def test_a_tower_of_fewer_sites_than_the_threshold_has_no_sum() -> None:
    members = [Member("c", "paired", 1), Member("a", "image", 1), Member("b", "image", 1)]
    assert secure_sum.cohorts(members, 2) == {"shared": ("a", "b", "c"), "image": ("a", "b", "c")}
    assert secure_sum.cohorts(members, 4) == {}
