"""A .npy file written row by row, and gone on with after a kill."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmix.errors import DataError

if TYPE_CHECKING:  # a hospital's preparation starts without torch
    pass


class ArrayFile:
    """A .npy file that grows by rows: the header leaves room for the count and is written again at the end.

    ``num_rows``: so many are there already, to be kept; what stands behind them is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...], *, num_rows: int = 0) -> None:
        self.dtype, self.num_rows, self._row_shape = dtype, num_rows, row_shape
        self._file = open(path, "r+b" if num_rows else "wb")  # noqa: SIM115  closed by the writer that owns it
        self._write_header()
        self._header_bytes = self._file.tell()
        if num_rows:
            self._keep(num_rows * math.prod(row_shape) * dtype.itemsize)

    def append(self, rows: NDArray[Any]) -> None:
        """Append [k, *row_shape]."""
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.num_rows += len(rows)

    def flush(self) -> None:
        """See the rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put the count into the header; closing twice is harmless."""
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "numpy pads the header for a first axis of up to 21 digits"
        self._file.close()

    def _keep(self, num_bytes: int) -> None:
        end = self._header_bytes + num_bytes
        if os.fstat(self._file.fileno()).st_size < end:
            self._file.close()
            raise DataError("what an interrupted preparation had finished is damaged; start over with --fresh")
        self._file.truncate(end)
        self._file.seek(end)

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
