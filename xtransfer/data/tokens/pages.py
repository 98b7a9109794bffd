"""Memory maps that stay small: pages that were read are given back, and read again from the system's cache."""

import mmap
from collections.abc import Sequence

import numpy as np

_AROUND = 64 << 10  # bytes that Linux maps around each one that is read
_MOST = 256 << 20  # bytes of mapped pages to keep, so that a process does not count all of a large file as its memory


class MappedPages:
    """The pages of memory-mapped arrays that a process has read.

    Args:
      arrays: the arrays, from `np.load` with `mmap_mode`.
    """

    def __init__(self, arrays: Sequence[np.memmap]) -> None:
        self._maps = [getattr(array, "_mmap", None) for array in arrays]
        self._read = 0

    def read(self, count: int) -> None:
        """Count places that have been read, anywhere in each array, and give the pages back if they are many."""
        self._read += count * len(self._maps) * _AROUND
        if self._read > _MOST and hasattr(mmap, "MADV_DONTNEED"):
            for one in self._maps:
                if one is not None:  # an empty array has no map
                    one.madvise(mmap.MADV_DONTNEED)
            self._read = 0
