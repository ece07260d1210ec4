"""What torch.save writes of one tensor, written and read at the speed of the disk: torch's own writer takes most of its
time for checksums, Python's reader of archives more than all else for a small tensor.

It is a zip archive without compression (PKWARE's APPNOTE 6.3): `data.pkl` describes the tensor, `data/0` has its
elements.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import zipfile
from typing import Any, NamedTuple, Protocol

import torch
from isal.isal_zlib import crc32

ALIGNMENT = 64
"""Bytes at whose multiples elements begin, as torch has them, counted from where the archive begins."""
LARGEST = (1 << 32) - (1 << 16)
"""Bytes that an archive may have whose numbers are of 32 bits."""
JANUARY_1980 = 0x21
ELEMENTS = b"/data/0"
"""What torch.save calls the elements of the tensor, after the archive's own name."""
LOCAL, ENTRY, END = struct.Struct("<4s22xHH"), struct.Struct("<4s6xH4xIIIHHH8xI"), struct.Struct("<4s6xHIIH")
"""What is read of the header before a record, of its entry in the directory, and of the end of the archive."""


class Elements(NamedTuple):
    """start: in the file. length: in bytes. checksum: their CRC-32 when they were written."""

    start: int
    length: int
    checksum: int


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


def elements(data: mmap.mmap, start: int, length: int) -> Elements:
    """Of the tensor whose archive is these bytes of a mapped file. An error of any kind when it is damaged: other bytes
    can fail to be an archive in any way."""
    if length > LARGEST:
        return _large_elements(data, start, length)
    stop = start + length
    signature, count, size, offset, comment = END.unpack_from(data, stop - END.size)
    if signature != b"PK\5\6" or comment or offset + size > length - END.size:
        raise zipfile.BadZipFile("it does not end as an archive does")
    at = start + offset
    for _ in range(count):
        signature, method, checksum, packed, held, name, extra, remark, header = ENTRY.unpack_from(data, at)
        if signature != b"PK\1\2":
            raise zipfile.BadZipFile("its directory is none")
        at += ENTRY.size
        if data[at + name - len(ELEMENTS) : at + name] == ELEMENTS:
            signature, *lengths = LOCAL.unpack_from(data, start + header)
            first = start + header + LOCAL.size + sum(lengths)
            if signature != b"PK\3\4" or method != zipfile.ZIP_STORED or packed != held or first + held > stop:
                raise zipfile.BadZipFile("its elements are not where they should be")
            return Elements(first, held, checksum)
        at += name + extra + remark
    raise zipfile.BadZipFile("it has no elements")


def _large_elements(data: mmap.mmap, start: int, length: int) -> Elements:
    """The same with numbers of 64 bits."""
    with zipfile.ZipFile(Slice(data, start, length)) as opened:
        record = next((info for info in opened.infolist() if info.filename.encode().endswith(ELEMENTS)), None)
    if record is None:
        raise zipfile.BadZipFile("it has no elements")
    _, *lengths = LOCAL.unpack_from(data, start + record.header_offset)
    first = start + record.header_offset + LOCAL.size + sum(lengths)
    if record.compress_type != zipfile.ZIP_STORED or first + record.file_size > start + length:
        raise zipfile.BadZipFile("its elements are not where they should be")
    return Elements(first, record.file_size, record.CRC)


class Slice(io.RawIOBase):
    """A part of a mapped file as a file."""

    def __init__(self, data: mmap.mmap, start: int, length: int):
        super().__init__()
        self.data, self._start, self._length, self._at = data, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = self._start + self._at
        data = self.data[start : min(start + len(buffer), self._start + self._length)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


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
