"""Slices within a bound, and groups that are sent whole."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import sites
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import DECODER, IMAGE, SHAPES, SHARED, site

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation import slabs
from fedmix.federation.aggregate import aggregate
from fedmix.federation.diagnostics import diagnose
from fedmix.federation.update import Update, rows_of
from fedmix.federation.weights import weights_of

SHAPE = st.lists(st.integers(0, 12), min_size=0, max_size=3)


@settings(max_examples=100, deadline=None)
@given(shape=SHAPE, num_held=st.integers(1, 20), bound=st.integers(8, 2000))
def test_slabs_cover_a_parameter_once_within_the_bound(shape: list[int], num_held: int, bound: int) -> None:
    rows, columns = rows_of(shape)
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "SLAB_BYTES", bound)
        for slab in slabs.slabs(shape, num_held):
            cells = (slab.stop - slab.start) * (slab.right - slab.left)
            assert cells > 0
            assert cells == 1 or cells * num_held * 8 <= bound
            seen[slab.start : slab.stop, slab.left : slab.right] += 1
    assert bool((seen == 1).all())


def test_slabs_by_hand() -> None:
    """Two MiB of float64 are 262,144 values: 170 rows of 1,536. At 1,000 sites 32 MiB leave 4,194: two rows and a bit."""
    assert list(slabs.slabs((384, 1536), 5)) == [(0, 170, 0, 1536), (170, 340, 0, 1536), (340, 384, 0, 1536)]
    assert next(slabs.slabs((384, 1536), 1000)) == (0, 2, 0, 1536)
    assert list(slabs.slabs((10_000,), 1000))[-1] == (0, 1, 8388, 10_000)


class Watched:
    """A contribution that notes how many of its values are asked for at once."""

    def __init__(self, update: Update) -> None:
        self.update, self.largest = update, 0
        self.site, self.examples, self.steps = update.site, update.examples, update.steps
        self.second_moments: Mapping[str, float] = {}

    def names(self) -> list[str]:
        return [*self.update.names()]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self.update.rows(name, start, stop)
        self.largest = max(self.largest, rows.numel())
        return rows


@pytest.mark.parametrize("combine", ["mean", "median", "trimmed_mean"])
def test_small_slabs_change_no_bit_and_are_all_that_is_read(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {SHARED: torch.Size([50, 3, 7]), IMAGE: torch.Size([11])}
    chance = tiny.generator(1)
    updates = [
        Update(
            f"s{number}",
            {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()},
            {"image": number + 1},
            1,
        )
        for number in range(6)
    ]
    rule = config.Aggregation(combine=combine, clip=0.9)
    whole = dict(aggregate(updates, shapes, rule))
    facts = diagnose(updates, shapes, weights_of(updates, rule))
    monkeypatch.setattr(slabs, "SLAB_BYTES", 8 * 6 * 63)
    watched = [Watched(update) for update in updates]
    sliced = dict(aggregate(watched, shapes, rule))
    assert all(torch.allclose(sliced[name], whole[name], rtol=1e-6, atol=0) for name in shapes)  # norms add up otherwise
    assert diagnose(watched, shapes, weights_of(watched, rule)) == pytest.approx(facts)
    # The mean and the norms hold one site's values at a time.
    assert max(one.largest for one in watched) <= 6 * 63


def test_half_a_group_costs_neither_the_others_work_nor_the_round() -> None:
    mask = "patch_decoder.mask"
    half = Update("b", {IMAGE: torch.full((4,), 3.0)}, {"image": 1}, 1)
    whole = Update("a", {IMAGE: torch.ones(4), mask: torch.ones(4)}, {"image": 1}, 1)
    groups = slabs.groups_of([half, whole])
    assert {label: (group.name, group.parameters) for label, group in groups.items()} == {
        DECODER: (DECODER, (mask,)),
        f"{DECODER}#2": (DECODER, (IMAGE,)),
    }
    shapes = {name: torch.Size([4]) for name in (IMAGE, mask)}
    found = dict(aggregate([half, whole], shapes, config.Aggregation()))
    assert torch.equal(found[mask], torch.ones(4))
    assert torch.equal(found[IMAGE], torch.full((4,), 2.0))
    assert diagnose([half, whole], shapes, weights_of([half, whole], config.Aggregation()))[f"weight/{DECODER}#2/b"] == 0.5


def test_groups_know_their_parameters_and_their_sites_in_name_order() -> None:
    groups = slabs.groups_of([site("b", image=1), site("c", text=1), site("a", paired=1)])
    assert list(groups) == sorted(groups)
    assert groups[DECODER].parameters == (IMAGE,)
    assert [one.site for one in groups[DECODER].senders] == ["a", "b"]
    assert [one.site for one in groups[DECODER].everyone] == ["a", "b", "c"]


@pytest.mark.parametrize("shape", [(1, 4), (4,), (3, 2), ()])
def test_rows_of_another_shape_are_refused_and_never_broadcast(shape: tuple[int, ...]) -> None:
    class Odd(Watched):
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return torch.ones(shape)

    with pytest.raises(UpdateError, match="rows 0 to 2 of an update came as"):
        slabs.read(Odd(site("a", image=1)), SHARED, slabs.Slab(0, 2, 0, 2))


@pytest.mark.parametrize("combine", ["mean", "median", "trimmed_mean"])
def test_updates_are_not_changed_by_adding_them_up(combine: str) -> None:
    """What is read may be the update's own memory."""
    updates = [site(f"s{k}", 10.0**k, image=1) for k in range(5)]
    rule = config.Aggregation(combine=combine, clip=0.5)
    sites.added(updates, rule)
    diagnose(updates, SHAPES, weights_of(updates, rule))
    assert [sites.first(dict(update.deltas), SHARED) for update in updates] == [10.0**k for k in range(5)]


def test_norm_is_euclidean_and_does_not_overflow() -> None:
    assert slabs.norm(site("a", 3.0, paired=1), [SHARED, IMAGE], SHAPES) == pytest.approx(3 * 8**0.5)
    assert slabs.norm(site("a", 3e38, paired=1), [IMAGE], SHAPES) == pytest.approx(6e38)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_norm_is_the_same_whatever_the_number_of_threads(num_threads: int) -> None:
    """A clip factor multiplies a site's whole change, and a resumed run may be given other cores."""
    shape = torch.Size([400, 1000])
    one = Update("a", {SHARED: torch.randn(shape, generator=tiny.generator(2))}, {"image": 1}, 1)
    expected = slabs.norm(one, [SHARED], {SHARED: shape})
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert slabs.norm(one, [SHARED], {SHARED: shape}) == expected
    finally:
        torch.set_num_threads(before)
