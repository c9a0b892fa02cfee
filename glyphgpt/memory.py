"""How the C library deals with memory that was freed."""

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have freed memory kept for the next piece of work, where glibc would give it back to the system.

    Otherwise each step on a CPU, and each piece of a large text, asks for the same thousands of pages anew, up to a
    third of its time. See mallopt(3).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries have no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)  # bytes
            _ = libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # glibc before 2.35
