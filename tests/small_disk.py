"""A disk that is soon full."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MNT_DETACH = 2
"""linux/fs.h: unmount now, and let go when the last mapped file is."""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of this size at `folder`; skips the test without the right to mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip(f"mounting a small disk needs privileges: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(str(folder).encode(), MNT_DETACH)
