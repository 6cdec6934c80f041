"""The heap of the process on Linux with glibc. Elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import sys


def reuse_freed_memory() -> None:
    """Let glibc keep large freed blocks until `trim_heap`.

    By default, it maps new pages for every tensor above 32 MiB, and each page faults at the first write.
    benchmarks/LOG.md has the cost.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if set_option is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        set_option(m_mmap_threshold, 1 << 30)
        set_option(m_trim_threshold, (1 << 31) - 1)


def trim_heap() -> None:
    """Return freed memory to the operating system; glibc keeps it otherwise.

    After a training step, this memory is over a gigabyte of activations.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
