"""The safetensors format: a checked header, tensors as views of the mapped file, and a writer that streams.

    8 bytes: length of the header, little-endian | JSON: name -> dtype, shape, data_offsets | data, without holes

Nothing in a header is believed: its length, the number of tensors, every name, shape and offset are checked against the
size of the file before anything of that size is allocated.

Matches: the safetensors package, in both directions, bit for bit. Our headers end with more spaces, so that the data begin at a
multiple of 64 bytes: some products of one row round differently where memory is not aligned so.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkit.errors import CheckpointError, CorruptCheckpointError
from vlkit.hub.strangers import stranger
from vlkit.hub.strict_json import parse_json

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 500_000
ALIGNMENT = 64  # bytes; where torch's own allocations begin

# In the order in which the safetensors package writes them: wide types first, so that every tensor is aligned.
_DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ORDER = {code: index for index, code in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        start: Its first byte in the file, and `stop` the one after its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The checked header of one file.

    Attributes:
        path: The file.
        tensors: Name -> type, shape and place.
        metadata: Texts.
        stamp: Which file it was, and in what state: device, inode, size and time of change.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: tuple[int, ...]


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CorruptCheckpointError: Not a safetensors file, or one that is truncated, extended or contradicts itself.
        CheckpointError: It cannot be read, or is larger than the limits.
    """
    try:
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            size = stamp[2]
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if length > size - 8 or len(head) < 8:
                raise CorruptCheckpointError(_not_safetensors(path, head + file.read(64), size, length))
            if length > max_header_bytes:
                found = stranger(head + file.read(64))
                raise CheckpointError(
                    f"{path}: its header has {length} bytes, more than max_header_bytes={max_header_bytes}"
                    + (f"; this is {found}" if found else "")
                )
            data = file.read(length)
    except CheckpointError:
        raise
    except OSError as failure:
        raise CheckpointError(f"{path}: cannot be read: {failure.strerror}") from failure
    if len(data) < length:
        raise CorruptCheckpointError(f"{path}: the file shrank while it was read; download it again")
    found = stranger(head + data[:64])
    if found:
        raise CorruptCheckpointError(f"{path}: not a safetensors file: this is {found}")
    # Counted before a Python object exists for each: a header of brackets would take a gigabyte.
    if data.count(b"{") > max_tensors + 1000 or data.count(b"[") > 2 * (max_tensors + 1000):
        raise CheckpointError(f"{path}: its header describes more than max_tensors={max_tensors} tensors")
    entries = parse_json(data, f"header of {path}", error=CorruptCheckpointError)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CorruptCheckpointError(f"{path}: the header's __metadata__ must map names to texts")
    if len(entries) > max_tensors:
        raise CheckpointError(f"{path}: {len(entries)} tensors, more than max_tensors={max_tensors}")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_tiling(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata, stamp)


def _stamp(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _not_safetensors(path: Path, head: bytes, size: int, length: int) -> str:
    found = stranger(head)
    if found:
        return f"{path}: not a safetensors file: this is {found}"
    if size < 8:
        return f"{path}: {size} bytes, too few for a safetensors file; download it again"
    return (
        f"{path}: truncated, or not a safetensors file: its first bytes announce a header of {length} bytes, "
        f"the file has {size}; download it again"
    )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpointError(f"{where}: expected dtype, shape and data_offsets in the header")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{where}: dtype {code!r} is not supported, only {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise CorruptCheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CorruptCheckpointError(f"{where}: data_offsets {offsets!r} are not two byte offsets")
    dtype = _DTYPES[code]
    num_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise CorruptCheckpointError(
            f"{where}: {code} {shape} needs {num_bytes} bytes, the header gives it {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Tensors follow one another without a hole or an overlap, from the header to the end of the file."""
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps another" if info.start < end else "leaves a hole before it"
            raise CorruptCheckpointError(f"{path}: tensor {name!r} {what} (byte {info.start}, expected {end})")
        end = info.stop
    if end != size:
        what = "truncated" if size < end else "has extra bytes at its end"
        raise CorruptCheckpointError(
            f"{path}: {what}: {size} bytes, its header says {end}; download it again, or run `git lfs pull`"
        )


class MappedFile:
    """The tensors of one safetensors file as views of the mapped file: nothing is read before it is used.

    The map is private: writing into a tensor never reaches the file. It lives as long as a tensor of it does.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        with header.path.open("rb") as file:
            if _stamp(file.fileno()) != header.stamp:
                raise CorruptCheckpointError(
                    f"{header.path}: the file was changed or replaced after its header was read; load it again"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(self, name: str) -> Tensor:
        """One tensor, as a view of the file."""
        return self.read_part(name, 0, self.header.tensors[name].shape)

    def read_part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """The numbers of a tensor from byte `start` on, in this shape, as a view with a storage of its own."""
        info = self.header.tensors[name]
        num_bytes, offset = math.prod(shape) * info.dtype.itemsize, info.start + start
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=info.dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=offset)
        if offset % info.dtype.itemsize:
            raw = raw.clone()  # other writers may leave a tensor unaligned
        return raw.view(info.dtype).view(shape)

    def release(self, name: str) -> None:
        """Let the system take back the pages of a tensor; who still looks at it reads them from the file again."""
        info, page = self.header.tensors[name], mmap.PAGESIZE
        start, stop = (
            -(-info.start // page) * page,
            info.stop // page * page,
        )  # whole pages: the rest is a neighbour's too
        if hasattr(mmap, "MADV_DONTNEED") and start < stop:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        path: The file, which must not exist.
        tensors: (name, dtype, shape) of every tensor.
        read: Gives a tensor by name. Called once for each; the tensor is let go before the next is asked for.
        metadata: Texts for the header.

    Raises:
        CheckpointError: A type that the format does not have.
    """
    for name, dtype, _ in tensors:
        if dtype not in _CODES:
            raise CheckpointError(f"tensor {name!r}: {dtype} cannot be written to safetensors")
    ordered = sorted(tensors, key=lambda tensor: (_ORDER[_CODES[tensor[1]]], tensor[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in ordered:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name} is not what was announced"
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
