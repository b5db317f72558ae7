"""Memory that the front and an engine process share."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field

_PAGE = mmap.PAGESIZE
ALIGNMENT = 64
"""Where tensors start: a cache line, which is also what TensorFlow asks of memory that it borrows."""


@dataclass(slots=True)
class Region:
    """An anonymous file that both sides map, and that either side can make larger."""

    fd: int
    size: int = 0
    _map: mmap.mmap | None = field(default=None, init=False)

    @classmethod
    def create(cls, name: str) -> Region:
        """Returns a new, empty region; its memory is freed when both sides have closed it."""
        return cls(os.memfd_create(name, os.MFD_CLOEXEC))

    def at_least(self, size: int) -> memoryview:
        """Returns the mapped memory, made ``size`` bytes or more. Views of before stay valid."""
        if size > self.size or self._map is None:
            wanted = max(_PAGE, 1 << (size - 1).bit_length()) if size else _PAGE
            if os.fstat(self.fd).st_size < wanted:
                os.ftruncate(self.fd, wanted)
            self._map = mmap.mmap(self.fd, wanted)
            self.size = wanted
        return memoryview(self._map)

    def close(self) -> None:
        """Lets go of the memory; views that are still held keep the mapping alive."""
        self._map = None
        os.close(self.fd)


def aligned(offset: int) -> int:
    """Returns the first place at or after ``offset`` where a tensor may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
