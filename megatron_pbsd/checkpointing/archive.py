"""What torch.save writes of one tensor, at the speed of the disk: torch's own takes most of its time for checksums.

It is a zip archive without compression (PKWARE's APPNOTE 6.3): `data.pkl` describes the tensor, `data/0` has its
elements.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any, Protocol

import torch
from isal.isal_zlib import crc32

ALIGNMENT = 64
"""Bytes at whose multiples elements begin, as torch has them, counted from where the archive begins."""
LARGEST = (1 << 32) - (1 << 16)
"""Bytes that an archive may have whose numbers are of 32 bits."""
JANUARY_1980 = 0x21


class Stream(Protocol):
    def write(self, data: Any, /) -> int: ...

    def tell(self) -> int: ...


def save(tensor: torch.Tensor, stream: Stream) -> None:
    """torch.load reads it. tensor: contiguous, on the CPU; of what it is a view, only its elements are written."""
    if tensor.nbytes > LARGEST:
        torch.save(_alone(tensor), stream)
        return
    begin, directory, records = stream.tell(), bytearray(), {
        "archive/data.pkl": _pickled(_alone(tensor)), "archive/byteorder": b"little",
        "archive/data/0": memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), "archive/version": b"3\n"}
    for name, content in records.items():
        encoded, at = name.encode(), stream.tell() - begin
        room = -(at + 30 + len(encoded) + 4) % ALIGNMENT
        padding = struct.pack("<2sH", b"FB", room) + bytes(room)
        facts = struct.pack("<HHHHHIII", 20, 0, 0, 0, JANUARY_1980, crc32(content), len(content), len(content))
        stream.write(b"PK\3\4" + facts + struct.pack("<HH", len(encoded), len(padding)) + encoded + padding)
        stream.write(content)
        directory += b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack(
            "<HHHHHII", len(encoded), 0, 0, 0, 0, 0, at) + encoded
    where = stream.tell() - begin
    stream.write(directory + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), where, 0))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as a storage of their own, without a copy."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    elements = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(elements, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def _pickled(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(tensor)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """A tensor's elements are elsewhere, which its description refers to as torch.save has it."""

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", getattr(torch, obj._pickle_storage_type()), "0", "cpu", obj._size()
        if isinstance(obj, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, "0", "cpu", obj.nbytes()
        return None
