"""Whether what is about to leave has the form that it should have, to the byte."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from fedmix.errors import PolicyError


def check_fields(record: ConfigRecord | MetricRecord, kinds: Mapping[str, type]) -> None:
    """Refuse a record with a field that is missing, of another type, or too many."""
    if set(record) != set(kinds) or any(type(record[name]) is not kind for name, kind in kinds.items()):
        raise PolicyError("the reply holds fields that nobody asked for, or lacks some")


def exact(array: Array) -> NDArray[Any]:
    """An array whose bytes are those that numpy writes for it, and not one more."""
    try:
        header = io.BytesIO(array.data[: 1 << 10])
        if array.stype != "numpy.ndarray" or np.lib.format.read_magic(header) != (1, 0):
            raise ValueError
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header, max_header_size=1 << 10)
        size, again = header.tell(), io.BytesIO()
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(again, {"descr": descr, "fortran_order": is_fortran, "shape": shape})
        isexact = (
            not dtype.hasobject
            and not (is_fortran and len(shape) > 1)
            and (array.dtype, tuple(array.shape)) == (str(dtype), shape)
            and array.data[:size] == again.getvalue()
            and len(array.data) - size == math.prod(shape) * dtype.itemsize
        )
        if not isexact:
            raise ValueError
        return np.frombuffer(array.data, dtype, offset=size).reshape(shape)
    except Exception as error:  # whatever numpy trips over, it is no array of an update
        raise PolicyError(f"the reply holds an array with more than numbers in it ({type(error).__name__})") from None
