"""Reading GGUF, the file format of llama.cpp: metadata, and weights turned back into fp32.

    read_gguf(path) -> (metadata, tensors by name)

Only what the files of tests/assets.py hold is understood: F32, Q8_0 and Q4_1.

Source: docs/gguf.md of ggml-org/ggml; the block formats are those of its ggml-common.h.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_BLOCK = 32  # weights of a quantised block


class _Reader:
    """Little-endian values, one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def _f32(raw: np.ndarray, count: int) -> np.ndarray:
    return raw[: 4 * count].view("<f4")


def _q8_0(raw: np.ndarray, count: int) -> np.ndarray:
    """Blocks of (scale fp16, 32 weights int8)."""
    blocks = raw[: count // _BLOCK * 34].reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return scale * blocks[:, 2:].view(np.int8)


def _q4_1(raw: np.ndarray, count: int) -> np.ndarray:
    """Blocks of (scale fp16, minimum fp16, 32 weights of 4 bits: the low halves of 16 bytes, then the high ones)."""
    blocks = raw[: count // _BLOCK * 20].reshape(-1, 20)
    scale, least = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    levels = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * levels + least


_FORMATS = {0: _f32, 3: _q4_1, 8: _q8_0}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata, and every tensor in fp32 with its shape as torch has it: [out, in]."""
    file = np.memmap(path, mode="c", dtype=np.uint8)  # copy on write: torch wants arrays that it may write
    reader = _Reader(memoryview(file))
    assert bytes(file[:4]) == b"GGUF"
    reader.at = 4
    assert reader.scalar("I") == 3, "version"
    num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        name = reader.text()
        metadata[name] = reader.value(reader.scalar("I"))
    places = []
    for _ in range(num_tensors):
        name = reader.text()
        shape = [reader.scalar("Q") for _ in range(reader.scalar("I"))][::-1]  # the fastest axis is listed first
        places.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in places:
        tensors[name] = _FORMATS[kind](np.asarray(file[start + offset :]), prod(shape)).reshape(shape)
    return metadata, tensors
