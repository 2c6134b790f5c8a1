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

SHAPE = st.lists(st.integers(0, 40), min_size=0, max_size=3)


@settings(max_examples=100, deadline=None)
@given(shape=SHAPE, num_held=st.integers(1, 50), bound=st.integers(8, 4000))
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


def test_parameters_of_a_usual_size_are_one_slab() -> None:
    assert list(slabs.slabs((384, 1536), 5)) == [(0, 384, 0, 1536)]


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
    assert max(one.largest for one in watched) <= 6 * 63  # the mean and the norms hold one site's values at a time


def test_half_a_group_is_refused() -> None:
    half = Update("b", {IMAGE: torch.ones(4)}, {"image": 1}, 1)
    other = Update("a", {IMAGE: torch.ones(4), "patch_decoder.mask": torch.ones(4)}, {"image": 1}, 1)
    with pytest.raises(UpdateError, match=r"different parameters of image\.decoder; a group is sent whole or not at all"):
        slabs.groups_of([half, other])


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


def test_what_is_read_may_be_changed() -> None:
    one = site("a", 2.0, image=1)
    slabs.read(one, SHARED, slabs.Slab(0, 2, 0, 2)).zero_()
    assert sites.first(dict(one.deltas), SHARED) == 2.0


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
