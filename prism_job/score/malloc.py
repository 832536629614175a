"""Settings of the process's allocators, so that its peak memory is what reduction holds. They change no number.

Settings of glibc and pyarrow; other C libraries lack the first and keep their defaults.
"""

import ctypes

import pyarrow as pa

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def share_one_heap() -> None:
    """Let all threads use one heap that keeps what they free. Call it before threads are started.

    A heap a thread kept 5 to 25 MB more, a different number in every run. Pages that are returned between two shards are
    faulted in and zeroed again: a third of the time that reading takes (measured).
    """
    _mallopt(_M_ARENA_MAX, 1)
    _mallopt(_M_TRIM_THRESHOLD, 2**30)
    _mallopt(_M_MMAP_THRESHOLD, 2**25)  # glibc's largest


def return_freed_memory() -> None:
    """Return the memory of the shards to the machine, and from now on that of every larger block when it is freed.

    Not while shards are read: every shard's pages would be faulted in again, and reading was a third as fast (measured).
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
