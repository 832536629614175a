"""How the process's allocators keep freed memory, so that its peak is what reduction holds. Changes no number.

Settings of glibc and pyarrow; other C libraries lack the first, and keep their own habits. Not: what is held, or by whom.
"""

from __future__ import annotations

import ctypes

import pyarrow as pa

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def share_one_heap() -> None:
    """All threads free into one heap, and it keeps what they free. Call it before threads are started.

    Each with its own kept 5 to 25 MB more, another number at every run. Pages that go back between two shards are faulted in
    and zeroed again: a third of the time that reading takes (measured).
    """
    _mallopt(_M_ARENA_MAX, 1)
    _mallopt(_M_TRIM_THRESHOLD, 2**30)
    _mallopt(_M_MMAP_THRESHOLD, 2**25)  # glibc's largest


def give_back_what_is_freed() -> None:
    """What the shards took goes back to the machine, and from now on all larger blocks as they are freed.

    Not while shards are read: every shard's pages would be faulted in anew, and reading was a third as fast (measured).
    """
    pa.set_memory_pool(pa.system_memory_pool())
    _mallopt(_M_TRIM_THRESHOLD, 2**18)
    _mallopt(_M_MMAP_THRESHOLD, 2**18)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
