"""Coded updates: what comes back, what is lost and kept, what is sent, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedmix.config import Wire
from fedmix.errors import RunError, UpdateError
from fedmix.federation.compression import (
    LARGEST,
    LEVELS,
    SMALLEST,
    Parts,
    check_parts,
    decode_rows,
    encode,
    num_kept,
    parts_of,
)
from fedmix.federation.update import rows_of

SHAPES = ((), (1,), (5,), (3, 4), (7, 9), (4, 1), (2, 3, 5))
CODINGS = ("float32", "float16", "int8", "int4")
WIRES = [Wire(coding=coding, keep=keep) for coding in CODINGS for keep in (1.0, 0.4)]  # type: ignore[arg-type]
ROUNDING = 1.0 + 2.0**-15  # what float32 adds to a bound of one step


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * 1e-3


def encoded(delta: Tensor, wire: Wire, seed: int = 0) -> Parts:
    return encode({"a": delta}, {}, wire, generator(seed))[0]["a"]


def decoded(parts: Parts, shape: torch.Size, wire: Wire) -> Tensor:
    return decode_rows(parts, rows_of(shape)[1], wire).reshape(shape)


def there_and_back(delta: Tensor, wire: Wire, seed: int = 0) -> Tensor:
    return decoded(encoded(delta, wire, seed), delta.shape, wire)


def step_of(delta: Tensor, coding: str) -> Tensor:
    """The step of integer codings, a row's largest value over the number of levels, for every value of ``delta``."""
    rows = delta.reshape(rows_of(delta.shape))
    step = (rows.abs().amax(dim=1, keepdim=True) / LEVELS[coding]).clamp_min(SMALLEST)
    return step.expand_as(rows).reshape(delta.shape)


def rows_of_floats(limit: float) -> Any:
    """Arrays of one to three rows with values of every size a float32 has, denormals and zeros among them."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


# ---- what comes back


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_without_top_k_is_the_identity_to_the_bit(shape: tuple[int, ...]) -> None:
    delta = values(shape)
    parts, residual = encode({"a": delta}, {}, Wire(), generator())
    assert decoded(parts["a"], delta.shape, Wire()).numpy().tobytes() == delta.numpy().tobytes()
    assert residual == {}


@given(rows_of_floats(float(np.finfo(np.float32).max)))
def test_float32_holds_whatever_is_finite(array: np.ndarray) -> None:
    assert there_and_back(torch.from_numpy(array), Wire()).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("coding", LEVELS)
@given(array=rows_of_floats(LARGEST), seed=st.integers(0, 99))
def test_an_integer_is_off_by_less_than_a_step(coding: str, array: np.ndarray, seed: int) -> None:
    wire, delta = Wire(coding=coding), torch.from_numpy(array)  # type: ignore[arg-type]
    error = (there_and_back(delta, wire, seed).double() - delta.double()).abs()
    assert bool((error < step_of(delta, coding).double() * ROUNDING).all())


@given(rows_of_floats(LARGEST))
def test_float16_is_off_by_half_its_last_bit_at_most(array: np.ndarray) -> None:
    error = np.abs(there_and_back(torch.from_numpy(array), Wire(coding="float16")).numpy().astype(np.float64) - array)
    assert (error <= np.maximum(np.abs(array, dtype=np.float64) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_zeros_come_back_as_zeros_and_leave_nothing(wire: Wire) -> None:
    delta = values((3, 10))
    delta[1] = 0.0
    parts, residual = encode({"a": delta}, {}, wire, generator())
    assert not decoded(parts["a"], delta.shape, wire)[1].any()
    assert not residual.get("a", torch.zeros(3, 10))[1].any()
    assert there_and_back(torch.zeros(3, 10), wire).tolist() == torch.zeros(3, 10).tolist()


@pytest.mark.parametrize("coding", LEVELS)
def test_the_largest_value_of_a_row_is_the_last_level_of_its_own_scale(coding: str) -> None:
    delta = torch.tensor([[1e-6, -4e-6, 0.0], [3.0, 2.0, -1.0]])
    found = there_and_back(delta, Wire(coding=coding))  # type: ignore[arg-type]
    assert torch.isclose(found[0, 1], delta[0, 1], rtol=1e-6)
    assert torch.isclose(found[1, 0], delta[1, 0], rtol=1e-6)


@pytest.mark.parametrize("coding", LEVELS)
def test_a_step_is_never_too_small_to_divide_by(coding: str) -> None:
    """Else zeros and denormals over a step of zero would be turned into whatever the processor makes of NaN."""
    parts = encoded(torch.tensor([[0.0, 0.0], [1e-44, -1e-45]]), Wire(coding=coding))  # type: ignore[arg-type]
    assert parts[":scale"].tolist() == [SMALLEST, SMALLEST]
    assert float(decode_rows(parts, 2, Wire(coding=coding)).abs().max()) <= SMALLEST  # type: ignore[arg-type]


@pytest.mark.parametrize("coding", LEVELS)
def test_stochastic_rounding_is_right_on_average(coding: str) -> None:
    """A coded value is its true one plus a step times (a coin - its chance): variance p (1 - p), at most a quarter step^2.

    Over n draws the mean is off by more than 5 standard errors in under one of a million values; here are 70.
    """
    draws, delta = 4000, values((7, 10))
    wire = Wire(coding=coding)  # type: ignore[arg-type]
    many = delta.repeat(draws, 1)  # rows have their own scale, so they are draws of the same coding
    mean = there_and_back(many, wire).double().reshape(draws, 7, 10).mean(dim=0)
    bound = 5.0 * 0.5 * step_of(delta, coding).double() / draws**0.5
    assert bool(((mean - delta.double()).abs() < bound).all())
    # The bound would see a coding that rounds to nearest: it is a fortieth of a step, rounding is off by a quarter.
    nearest = (delta / step_of(delta, coding)).round() * step_of(delta, coding)
    assert bool(((nearest.double() - delta.double()).abs() > bound).any())


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    delta = values((20, 30))
    assert encoded(delta, Wire(coding="int8"), 1)[""].tobytes() == encoded(delta, Wire(coding="int8"), 1)[""].tobytes()
    assert encoded(delta, Wire(coding="int8"), 1)[""].tobytes() != encoded(delta, Wire(coding="int8"), 2)[""].tobytes()


def test_the_order_of_parameters_changes_no_bit() -> None:
    deltas = {name: values((4, 6), seed) for seed, name in enumerate("abc")}
    wire = Wire(coding="int4", keep=0.5)
    one, _ = encode(deltas, {}, wire, generator())
    other, _ = encode(dict(reversed(deltas.items())), {}, wire, generator())
    assert {name: {part: array.tobytes() for part, array in one[name].items()} for name in "abc"} == {
        name: {part: array.tobytes() for part, array in other[name].items()} for name in "abc"
    }


def test_int4_is_packed_by_hand() -> None:
    delta = torch.tensor([[7.0, -7.0, 1.0], [0.0, 14.0, -2.0]])
    parts = encoded(delta, Wire(coding="int4"))  # whole multiples of the steps 1 and 2, so no chance is in it
    assert parts[":scale"].tolist() == [1.0, 2.0]
    assert parts[""].tolist() == [[15 + 16 * 1, 9], [8 + 16 * 15, 7]]  # value + 8, the first in the lower half
    assert there_and_back(delta, Wire(coding="int4")).tolist() == delta.tolist()


def test_top_k_sends_the_largest_of_each_row_and_their_places() -> None:
    delta = torch.tensor([[0.1, -3.0, 2.0, 0.0], [5.0, 1.0, -1.5, 4.0]])
    parts = encoded(delta, Wire(keep=0.5))
    assert parts[":index"].tolist() == [[1, 2], [0, 3]]
    assert parts[""].tolist() == [[-3.0, 2.0], [5.0, 4.0]]
    assert there_and_back(delta, Wire(keep=0.5)).tolist() == [[0.0, -3.0, 2.0, 0.0], [5.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize(("columns", "keep", "kept"), [(1, 0.01, 1), (10, 0.1, 1), (96, 0.1, 10), (100, 0.07, 7), (9, 1.0, 9)])
def test_a_row_sends_its_share_and_at_least_one(columns: int, keep: float, kept: int) -> None:
    assert num_kept(columns, Wire(keep=keep)) == kept


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_rows_can_be_decoded_a_slice_at_a_time(wire: Wire) -> None:
    delta = values((11, 7))
    parts = encoded(delta, wire)
    slices = [
        decode_rows({part: array[start:stop] for part, array in parts.items()}, 7, wire)
        for start, stop in pairwise((0, 1, 4, 4, 11))
    ]
    assert torch.cat(slices).numpy().tobytes() == decode_rows(parts, 7, wire).numpy().tobytes()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_arrays_that_cannot_be_written_to_are_decoded(wire: Wire) -> None:
    """As they come out of a message's bytes; what is decoded is the reader's own."""
    parts = encoded(values((3, 8)), wire)
    frozen = {part: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for part, array in parts.items()}
    found = decode_rows(frozen, 8, wire)
    before = found.clone()
    found += 1.0
    assert decode_rows(frozen, 8, wire).tolist() == before.tolist()


# ---- what is lost and kept


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire != Wire()], ids=str)
def test_what_was_sent_and_what_is_left_are_the_update(wire: Wire) -> None:
    delta = values((6, 10))
    parts, residual = encode({"a": delta}, {}, wire, generator())
    assert torch.allclose(decoded(parts["a"], delta.shape, wire) + residual["a"], delta, rtol=0.0, atol=1e-9)
    assert residual["a"].shape == delta.shape


@pytest.mark.parametrize("coding", ["float16", "int8", "int4"])
@settings(max_examples=25)
@given(scales=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8), seed=st.integers(0, 999))
def test_the_sum_of_what_was_sent_follows_the_sum_of_the_updates_within_a_step(
    coding: str, scales: list[float], seed: int
) -> None:
    """Whatever the updates are, the sums differ by what one round's coding lost, not by what all of them did."""
    wire = Wire(coding=coding)  # type: ignore[arg-type]
    chance, residual = generator(seed), {}
    true, sent = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    for number, scale in enumerate(scales):
        delta = values((3, 8), seed + number) * scale
        wanted = delta + residual.get("a", 0.0)
        parts, residual = encode({"a": delta}, residual, wire, chance)
        true += delta
        sent += decoded(parts["a"], delta.shape, wire)
        step = step_of(wanted, coding) if coding in LEVELS else wanted.abs() * 2.0**-11 + 2.0**-25
        assert bool(((true - sent).abs() <= step.double() * ROUNDING + 1e-9).all())


@pytest.mark.parametrize("feedback", [True, False])
def test_small_values_beside_a_large_one_are_sent_in_time_by_feedback_alone(feedback: bool) -> None:
    delta = torch.tensor([[1.0] + [0.125] * 9])
    wire = Wire(keep=0.1, error_feedback=feedback)
    sent, residual = torch.zeros_like(delta), dict[str, Tensor]()
    for _ in range(200):
        parts, residual = encode({"a": delta}, residual, wire, generator())
        sent += decoded(parts["a"], delta.shape, wire)
    assert bool(residual) == feedback
    if feedback:  # what is left over stays within a few rounds' updates
        assert bool(((200 * delta - sent).abs() < 3.0).all())
    else:
        assert sent.tolist() == [[200.0] + [0.0] * 9]


def test_a_parameter_that_is_not_sent_keeps_its_residual() -> None:
    wire = Wire(coding="int8")
    _, residual = encode({"a": values((2, 3)), "b": values((2, 3), 1)}, {}, wire, generator())
    _, later = encode({"a": values((2, 3), 2)}, residual, wire, generator())
    assert later["b"].tolist() == residual["b"].tolist()
    assert later["a"].tolist() != residual["a"].tolist()


def test_encoding_leaves_its_arguments_alone() -> None:
    delta, left = values((2, 3)), values((2, 3), 1) * 0.01
    for wire in WIRES:
        encode({"a": delta}, {"a": left}, wire, generator())
    assert (delta.tolist(), left.tolist()) == (values((2, 3)).tolist(), (values((2, 3), 1) * 0.01).tolist())


def test_the_residual_of_another_model_is_refused() -> None:
    with pytest.raises(RunError, match="residual kept at this site belongs to another experiment"):
        encode({"a": values((2, 3))}, {"a": torch.zeros(3, 2)}, Wire(coding="int8"), generator())


# ---- what is sent


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_encoded_is_what_the_schema_says(shape: tuple[int, ...], wire: Wire) -> None:
    parts, schema = encoded(values(shape), wire), parts_of(shape, wire)
    assert {part: (array.dtype, array.shape) for part, array in parts.items()} == schema
    check_parts(parts, rows_of(shape)[1], wire)


@pytest.mark.parametrize(
    ("wire", "num_bytes"),
    [
        (Wire(), 384 * 96 * 4),
        (Wire(coding="float16"), 384 * 96 * 2),
        (Wire(coding="int8"), 384 * (96 + 4)),
        (Wire(coding="int4"), 384 * (48 + 4)),
        (Wire(keep=0.1), 384 * 10 * (4 + 2)),
        (Wire(coding="int8", keep=0.1), 384 * (10 * (1 + 2) + 4)),
        (Wire(coding="int4", keep=0.1), 384 * (5 + 10 * 2 + 4)),
    ],
    ids=str,
)
def test_bytes_by_hand(wire: Wire, num_bytes: int) -> None:
    assert sum(array.nbytes for array in encoded(values((384, 96)), wire).values()) == num_bytes


def test_a_long_row_has_long_indices() -> None:
    assert parts_of((65536,), Wire(keep=0.5))[":index"] == (np.dtype(np.uint16), (1, 32768))
    assert parts_of((65537,), Wire(keep=0.5))[":index"] == (np.dtype(np.int32), (1, 32768))
    delta = torch.zeros(70001)
    delta[70000] = 1.0
    assert float(there_and_back(delta, Wire(keep=1e-5))[70000]) == 1.0


# ---- what is refused


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_an_update_that_is_not_finite_is_refused(odd: float, wire: Wire) -> None:
    delta = values((3, 4))
    delta[1, 2] = odd
    with pytest.raises(UpdateError, match=r"^a: update holds values that are not finite; lower the learning rate"):
        encode({"a": delta}, {}, wire, generator())


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire != Wire()], ids=str)
def test_values_that_a_coding_cannot_hold_are_refused_and_not_sent_as_infinite(wire: Wire) -> None:
    assert bool(there_and_back(torch.tensor([[LARGEST, -LARGEST, 1.0]]), wire).isfinite().all())
    with pytest.raises(UpdateError, match=r"^a: update holds values beyond 65504"):
        encode({"a": torch.tensor([[1.0, -65505.0]])}, {}, wire, generator())


def changed(wire: Wire, part: str, place: tuple[int, ...], value: float) -> Parts:
    parts = encoded(values((3, 10)), wire)
    parts[part] = parts[part].copy()
    parts[part][place] = value
    return parts


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, -1e-9, 1e30])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    for wire in (Wire(coding="int8"), Wire(coding="int4", keep=0.4)):
        with pytest.raises(UpdateError, match="a scale that is not a number from 0 to 65504"):
            check_parts(changed(wire, ":scale", (1,), scale), 10, wire)


@pytest.mark.parametrize("coding", ["float32", "float16"])
def test_values_that_are_not_finite_are_refused_before_they_are_decoded(coding: str) -> None:
    wire = Wire(coding=coding)  # type: ignore[arg-type]
    with pytest.raises(UpdateError, match="not finite"):
        check_parts(changed(wire, "", (2, 2), float("nan")), 10, wire)


@pytest.mark.parametrize("wire", [Wire(keep=0.4), Wire(coding="int4", keep=0.4)], ids=str)
def test_indices_out_of_range_or_repeated_are_refused(wire: Wire) -> None:
    with pytest.raises(UpdateError, match="not one of a row's 10 places"):
        check_parts(changed(wire, ":index", (1, 3), 10), 10, wire)
    signed = encoded(values((3, 10)), wire)
    signed[":index"] = signed[":index"].astype(np.int32)
    signed[":index"][0, 0] = -1
    with pytest.raises(UpdateError, match="not one of a row's 10 places"):
        check_parts(signed, 10, wire)
    repeated = encoded(values((3, 10)), wire)
    repeated[":index"][2, 1] = repeated[":index"][2, 0]
    with pytest.raises(UpdateError, match="repeat or do not rise"):
        check_parts(repeated, 10, wire)


@given(st.data())
def test_whatever_is_let_through_is_decoded_to_finite_values(data: st.DataObject) -> None:
    wire = data.draw(st.sampled_from(WIRES))
    schema = parts_of((3, 10), wire)
    parts = {part: data.draw(hnp.arrays(dtype, shape)) for part, (dtype, shape) in schema.items()}
    try:
        check_parts(parts, 10, wire)
    except UpdateError:
        return
    found = decode_rows(parts, 10, wire)
    assert found.shape == (3, 10)
    assert bool(found.isfinite().all())
