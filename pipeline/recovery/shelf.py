"""Where the activations of both networks lie: in memory, or in mapped files once there are too many bytes of them."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ON_DISK = 2 << 30
"""Bytes of activations of both networks together, beyond which further ones are kept in a file that is mapped."""
LARGE = 1 << 16
"""Numbers in a tensor, from which on it is counted and may go to disk."""


@dataclass
class Shelf:
    """Counts the bytes that lie in memory; from `limit` on, further large tensors are moved into files in `folder`."""

    limit: int
    folder: Path | None = None
    held: int = 0
    on_disk: int = 0
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tensor -> its bytes, and how many nodes have it for their value: what is written in place is that of several."""
    mapped: weakref.WeakValueDictionary[int, mmap.mmap] = field(default_factory=weakref.WeakValueDictionary)
    """Address of a tensor's memory -> the file behind it."""

    def put(self, value: Any, *, move: bool = True) -> Any:
        """`value` of one more node, moved into a file where it is a large tensor of its own and memory is full."""
        if not isinstance(value, Tensor) or value.numel() < LARGE:
            return value
        if id(value) in self.counted:
            size, nodes = self.counted[id(value)]
            self.counted[id(value)] = size, nodes + 1
            return value
        if value._is_view():
            return value
        size = value.numel() * value.element_size()
        if self.held + size <= self.limit or not move:
            self.held += size
            self.counted[id(value)] = size, 1
            return value
        self.on_disk += size
        with tempfile.TemporaryFile(dir=self.folder) as file:  # it has no name; the space is free when the value goes
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        stored = torch.frombuffer(pages, dtype=value.dtype).view(value.shape).copy_(value)
        self.mapped[stored.untyped_storage().data_ptr()] = pages
        self.rest(stored)
        return stored

    def rest(self, value: Any) -> None:
        """Free the memory of a value that lies in a file, until it is read again."""
        pages = self.mapped.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written is kept by the file

    def drop(self, value: Any) -> None:
        """Forget a value that nobody reads any more."""
        size, nodes = self.counted.get(id(value), (0, 0))
        if nodes > 1:
            self.counted[id(value)] = size, nodes - 1
        elif nodes:
            self.held -= size
            del self.counted[id(value)]
