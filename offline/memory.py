"""What a long run keeps of the memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables that say how many kernels oneDNN and ideep keep."""
_KERNELS = 64
_THRESHOLD = 2**23
_M_MMAP_THRESHOLD = -3
"""Of malloc.h, for glibc's mallopt (mallopt(3))."""


def return_freed_memory() -> bool:
    """From now on, blocks of 8 MiB and more go back to the system when they are freed. Returns whether the allocator obeys.

    glibc raises its threshold to 32 MiB as such blocks are freed; activations of many shapes then lie among what stays, and
    leave holes that no later batch fits. A discovery peaked a fifth higher, and the more the longer it ran. Giving smaller
    blocks back at once as well costs up to half of the speed where page faults are slow (docs/discovery.md); `trim` does it
    now and then. Does nothing without glibc, and nothing where the environment sets the threshold
    (``MALLOC_MMAP_THRESHOLD_``) or another allocator is loaded.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    except AttributeError:  # musl has no mallopt
        return False


def bound_kernel_caches() -> None:
    """oneDNN keeps the kernels of the last 64 products instead of 1,024, and so does ideep, which torch puts around it.

    A kernel is made for a shape, and almost every batch has a shape of its own: left alone, the two caches grow by 5 MiB a
    batch. A forward and backward pass needs about a dozen, again in every layer. They read the environment, which child
    processes inherit, when the first kernel is made: after that nothing changes in this process. What is set there has the last
    word (oneDNN's documentation, "Primitive Cache"; ideep's lru_cache.hpp).
    """
    for variable in _KERNEL_CACHES:
        os.environ.setdefault(variable, str(_KERNELS))


def unbounded_environment() -> dict[str, str]:
    """The environment without the bounds, for child processes that do something else: a server needs more kernels."""
    return {name: value for name, value in os.environ.items() if name not in _KERNEL_CACHES}


def trim() -> None:
    """Gives back what lies freed between smaller blocks that stay, which glibc never does by itself (malloc_trim(3)).

    At the end of a stage that is what its batches took, a gibibyte on a model of 135 million parameters: the next stage's peak
    would come on top of it. Takes milliseconds. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(AttributeError):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)
