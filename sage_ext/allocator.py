"""What a program of its own may tell the C library's allocator. Nothing here runs on import: the process is its owner's."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory() -> bool:
    """glibc keeps the memory that is freed, for the next allocation, in this process from now on; whether it could be told.

    By default it hands large blocks back to the system, and the next step of a training run, which wants the same blocks
    again, pays for every page of them anew (docs/performance.md). Where there is no glibc, nothing changes: False.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries' mallopt, where there is one, means other things)
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: CDLL(None), on Windows
        return False
    if not (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):  # glibc < 2.35 takes no more
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
