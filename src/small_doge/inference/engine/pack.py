"""Weights in one flat file: how they are rounded, what the file looks like, and how a model gets into it.

A file is ``DOGEPACK``, the length and the CRC-32 of a JSON header (two little-endian uint32), the header, and from the
next multiple of 64 on the data. The header says what the model is made of, where each tensor starts in the data, the
data's length and its CRC-32. Rows of matrices are what ``vectors`` describes.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .layout import padded

MAGIC, VERSION = b"DOGEPACK", 1
FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # as in ``vectors``, which needs Numba
PRECISIONS = {"float32": FLOAT32, "bf16": BFLOAT16, "int8": INT8, "int4": INT4}
ALIGN = 64
GROUP = {INT8: 64, INT4: 32}  # weights that share a scale


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 of any shape → the upper halves of the nearest bfloat16, ties to even, uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Upper halves, uint16 of any shape, → the float32 that they are."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(x: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (R, n), n a multiple of 64, → its rows and their scales, as bytes."""
    x = np.ascontiguousarray(x, np.float32)
    none = np.empty(0, np.uint8)
    if kind == FLOAT32:
        return x.reshape(-1).view(np.uint8), none
    if kind == BFLOAT16:
        pairs = to_bfloat16(x).reshape(-1, 2, 16).transpose(0, 2, 1)
        return np.ascontiguousarray(pairs).reshape(-1).view(np.uint8), none
    groups = x.reshape(-1, GROUP[kind])
    if kind == INT8:
        scales = np.abs(groups).max(-1) / np.float32(127)
        whole = np.rint(_divided(groups, scales)).astype(np.int8)
        return whole.reshape(-1).view(np.uint8), scales.view(np.uint8)
    scales, whole = _nearest_int4(groups)
    halves = (whole + 8).astype(np.uint8).reshape(-1, 2, 32)  # of each block the first 32 and the others
    return (halves[:, 0] | (halves[:, 1] << 4)).reshape(-1), scales.view(np.uint8)


def decode(rows: np.ndarray, scales: np.ndarray, kind: int, R: int) -> np.ndarray:
    """The inverse of :func:`encode`, float32 (R, n)."""
    if kind == FLOAT32:
        return rows.view(np.float32).reshape(R, -1)
    if kind == BFLOAT16:
        return from_bfloat16(rows.view(np.uint16).reshape(-1, 16, 2).transpose(0, 2, 1)).reshape(R, -1)
    if kind == INT8:
        return (rows.view(np.int8).reshape(-1, GROUP[kind]) * scales.view(np.float32)[:, None]).reshape(R, -1)
    by = from_bfloat16(scales.view(np.uint16))[:, None]
    both = rows.reshape(-1, 32)
    whole = np.stack([both & 15, both >> 4], 1).astype(np.int8) - np.int8(8)
    return (whole.reshape(-1, GROUP[kind]) * by).reshape(R, -1)


def _divided(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return groups * np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)[:, None]


def _nearest_int4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and whole numbers −8 … 7 of least squared error, among scales that put the largest between 5.5 and 9.

    The scale is negative where that puts the largest of a group at −8, which has no counterpart above.
    """
    scales = np.empty(len(groups), np.uint16)
    whole = np.empty(groups.shape, np.int8)
    for start in range(0, len(groups), 1 << 14):
        g = groups[start : start + (1 << 14)]
        largest = np.take_along_axis(g, np.abs(g).argmax(-1)[:, None], -1)[:, 0]
        least = np.full(len(g), np.inf, np.float32)
        for level in (-9, -8.5, -8, -7.5, -7, -6.5, -6, 5.5, 6, 6.5, 7, 7.5, 8):
            bits = to_bfloat16(largest / np.float32(level))
            by = from_bfloat16(bits)
            q = np.rint(_divided(g, by)).clip(-8, 7)
            # The scale that fits these whole numbers best, and how far off it is.
            norm = (q * q).sum(-1)
            bits = to_bfloat16(np.divide((q * g).sum(-1), norm, out=np.zeros_like(norm), where=norm != 0))
            error = ((q * from_bfloat16(bits)[:, None] - g) ** 2).sum(-1)
            better = error < least
            least[better] = error[better]
            scales[start : start + len(g)][better] = bits[better]
            whole[start : start + len(g)][better] = q[better]
    return scales, whole


class Packed:
    """The contents of a packed file: its header, and its bytes, which nothing may write."""

    def __init__(self, header: dict[str, Any], data: np.ndarray, source: str):
        self.header, self.data, self.source = header, data, source

    @property
    def precision(self) -> str:
        """float32, bf16, int8 or int4: that of the matrices."""
        return self.header["precision"]

    def matrix(self, name: str) -> np.ndarray:
        """A matrix as float32 (rows, columns), without its padding."""
        e = self.header["tensors"][name]
        rows, columns = e["shape"]
        kind, scales = e["kind"], np.empty(0, np.uint8)
        if "scales" in e:
            scales = self.data[e["scales"][0] : sum(e["scales"])]
        return decode(self.data[e["at"] : e["at"] + e["bytes"]], scales, kind, rows)[:, :columns]

    def vector(self, name: str) -> np.ndarray:
        """A vector, (n,) float32."""
        e = self.header["tensors"][name]
        return self.data[e["at"] : e["at"] + e["bytes"]].view(np.float32)


def pack(tensors: Iterator[tuple[str, np.ndarray, int]], model: dict[str, Any], precision: str) -> Packed:
    """Round tensors and lay them out.

    Args:
        tensors: name, float32 array of one or two dimensions, kind. Columns are padded to a multiple of 64.
        model: what the header says of the model.
    """
    pieces: list[np.ndarray] = []
    entries: dict[str, Any] = {}
    size = 0

    def add(piece: np.ndarray) -> int:
        nonlocal size
        pieces.append(piece)
        pieces.append(np.zeros(-len(piece) % ALIGN, np.uint8))
        at, size = size, size + padded(len(piece), ALIGN)
        return at

    for name, x, kind in tensors:
        if x.ndim == 1:
            piece = np.ascontiguousarray(x, np.float32).view(np.uint8)
            entries[name] = {"shape": list(x.shape), "kind": FLOAT32, "at": add(piece), "bytes": len(piece)}
            continue
        wide = np.zeros((x.shape[0], padded(x.shape[1])), np.float32)
        wide[:, : x.shape[1]] = x
        rows, scales = encode(wide, kind)
        entries[name] = {"shape": list(x.shape), "kind": kind, "at": add(rows), "bytes": len(rows)}
        if len(scales):
            entries[name]["scales"] = [add(scales), len(scales)]
    data = np.concatenate(pieces)
    data.flags.writeable = False
    header = {"version": VERSION, "precision": precision, "model": model, "tensors": entries}
    header |= {"data_bytes": len(data), "data_crc32": zlib.crc32(data.data)}
    return Packed(header, data, "memory")


def write(packed: Packed, path: Path) -> None:
    """Write a packed file, whole or not at all."""
    header = json.dumps(packed.header).encode()
    head = MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head + bytes(-len(head) % ALIGN))
            file.write(packed.data.data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Packed:
    """Map a packed file into memory.

    Raises:
        UserError: if it is no packed file, of another version, or cut short or damaged.
    """
    import mmap

    def wrong(found: str) -> UserError:
        return UserError(f"the packed weights {path} {found}, expected a file that `doge quantize` wrote; make it anew")

    try:
        with open(path, "rb") as file:
            start = file.read(16)
            if len(start) < 16 or start[:8] != MAGIC:
                raise wrong("begin with other bytes than DOGEPACK")
            length, checksum = struct.unpack("<II", start[8:])
            text = file.read(length)
            if len(text) < length or zlib.crc32(text) != checksum:
                raise wrong("have a damaged header")
            header = json.loads(text)
            if header["version"] != VERSION:
                raise wrong(f"are of version {header['version']} and this program reads {VERSION}")
            first, size = padded(16 + length, ALIGN), file.seek(0, os.SEEK_END)
            if size != first + header["data_bytes"]:
                raise wrong(f"are {size:,} bytes instead of {first + header['data_bytes']:,}")
            whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise UserError(f"the packed weights {path} cannot be read: {error.strerror}") from error
    data = whole[first:]
    if zlib.crc32(data.data) != header["data_crc32"]:
        raise wrong("are damaged: their checksum differs")
    return Packed(header, data, str(path))
