"""One value of every candidate in a scratch file: appended in plan order, then read in parts.

What selection needs whole is held in memory; all else of a candidate lies in columns, so that memory does not grow with it.

Shapes: N rows in plan order.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from prism_job.errors import TransientError

PART_ROWS = 2**14
"""Rows handled at a time wherever all candidates are gone through; a row group of the published tables. With four times as
many, pyarrow holds 40 MB more while it writes."""

SCRATCH_FIX = (
    "free about 100 bytes a candidate there (16 more for each target set, 512 for dedupe: near), or point TMPDIR to a "
    "larger disk"
)


def parts(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, PART_ROWS):
        yield slice(start, min(start + PART_ROWS, num_rows))


class Column:
    """Values of one type in an unnamed file of the scratch folder (TMPDIR); gone with the object.

    Raises TransientError: the scratch folder has no room.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype, self._num_rows = np.dtype(dtype), 0
        self._file = tempfile.TemporaryFile(prefix="prism-")  # noqa: SIM115 (open as long as the column lives)

    def __len__(self) -> int:
        return self._num_rows

    def append(self, values_N: NDArray[Any]) -> None:
        try:
            self._file.write(np.ascontiguousarray(values_N, self.dtype).tobytes())
            self._file.flush()
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise TransientError(what, where=tempfile.gettempdir(), fix=SCRATCH_FIX) from error
        self._num_rows += len(values_N)

    def part(self, rows: slice) -> NDArray[Any]:
        """The values of rows that follow one another."""
        size = self.dtype.itemsize
        return self._values(os.pread(self._file.fileno(), (rows.stop - rows.start) * size, rows.start * size))

    def at(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """The values of these rows, in their order."""
        # Read one by one: a memory map would count whole pages, in the end the whole file, as this process's memory.
        descriptor, size = self._file.fileno(), self.dtype.itemsize
        return self._values(b"".join(os.pread(descriptor, size, row * size) for row in rows.tolist()))

    def _values(self, content: bytes) -> NDArray[Any]:
        return np.frombuffer(content, self.dtype)
