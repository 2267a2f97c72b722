"""Checkpoint folders: tensors by name over one file or many, read lazily and written in shards.

    folder: model.safetensors                                  one file
            model-00001-of-00007.safetensors, ...              or many, and
            model.safetensors.index.json                       the index, which says where each tensor is

    open_checkpoint(folder)  -> Checkpoint: names, shapes, types; .read(name) is a view of the mapped file
    write_checkpoint(folder, tensors, read, max_shard_size="5GB")
    write_manifest(folder); verify_manifest(folder)            sha256 of every file, as sha256sum writes it

What can be known without reading tensors is checked by `open_checkpoint`: names, shapes, sizes, missing files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkit.errors import CheckpointError, ConfigError, CorruptCheckpointError
from vlkit.hub.atomic import check_space
from vlkit.hub.index import INDEX, MANIFEST, WEIGHTS, read_index, weight_files
from vlkit.hub.report import collapse
from vlkit.hub.safe_files import check_name, safe_file
from vlkit.hub.safetensors_file import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    MappedFile,
    TensorInfo,
    read_header,
    write_safetensors,
)
from vlkit.hub.strangers import stranger

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class Checkpoint:
    """The tensors of a folder.

    Attributes:
        folder: The folder.
        tensors: Name -> type, shape and place.
        file_of: Name -> path of its file.
        metadata: Texts in the headers of the files.
        mapped: Whether tensors are views of mapped files, each with a storage of its own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        file_of: dict[str, Path],
        opener: Callable[[Path], object],
        metadata: Mapping[str, str],
        mapped: bool,
    ) -> None:
        self.folder, self.tensors, self.file_of, self.metadata = folder, tensors, file_of, metadata
        self.mapped = mapped
        self._opener = opener
        self._open: tuple[Path, Any] | None = None  # one file at a time

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def part(self, prefix: str) -> Checkpoint:
        """The tensors whose names begin with a prefix, under these names."""
        tensors = {name: info for name, info in self.tensors.items() if name.startswith(prefix)}
        return Checkpoint(self.folder, tensors, self.file_of, self._opener, self.metadata, self.mapped)

    def read(self, name: str) -> Tensor:
        """One tensor, as a view of its mapped file; copy what is to be kept.

        Raises:
            CheckpointError: No tensor has this name.
        """
        tensor: Tensor = self._file_of(name).read(name)
        return tensor

    def in_place(self, name: str, whole: Tensor, block: Tensor) -> Tensor | None:
        """A block of a tensor that was read, as a view of the mapped file with a storage of its own.

        None if it is none: the block is a copy, or lies scattered.
        """
        if block is whole:
            return whole
        start = block.data_ptr() - whole.data_ptr()
        if not (block.is_contiguous() and 0 <= start <= start + block.nbytes <= whole.nbytes):
            return None
        part: Tensor = self._file_of(name).read_part(name, start, block.shape)
        return part

    def _file_of(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        path = self.file_of[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, self._opener(path))
        return self._open[1]

    def release(self, name: str) -> None:
        """A tensor was copied: its pages of the mapped file need not count as memory of this process any longer."""
        if self.mapped:
            self._file_of(name).release(name)

    def close(self) -> None:
        """Let go of the mapped file. Tensors that are still in use keep theirs."""
        self._open = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    folder: Path | str,
    *,
    allow_pickle: bool = False,
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_tensors: int = MAX_TENSORS,
) -> Checkpoint:
    """Read what a folder says of its tensors, and check it. Reads no tensor.

    Args:
        folder: A checkpoint folder.
        allow_pickle: Also read `pytorch_model.bin` where there is no safetensors file, with torch's restricted
            unpickler (`weights_only`), which loads tensors and nothing else.
        max_header_bytes: Largest header of a file.
        max_tensors: Most tensors in a file.

    Raises:
        CheckpointError: No weights, or only pickled ones without `allow_pickle`; missing files (all of them named).
        CorruptCheckpointError: A file that is not what its name says, or an index that contradicts its files.
        UnsafePathError: A name in the index that would leave the folder.
    """
    folder = Path(folder)
    names = weight_files(folder, allow_pickle=allow_pickle)
    index = names.pop(0) if names[0].endswith(".json") else None
    weight_map = read_index(folder, index) if index is not None else None
    files = {name: safe_file(folder, name) for name in names}
    if names[0].endswith(".safetensors"):
        headers = {
            name: read_header(path, max_header_bytes=max_header_bytes, max_tensors=max_tensors)
            for name, path in files.items()
        }
        contents = {name: header.tensors for name, header in headers.items()}
        metadata = {key: text for header in headers.values() for key, text in header.metadata.items()}
        by_path = {files[name]: header for name, header in headers.items()}
        opener: Callable[[Path], object] = lambda path: MappedFile(by_path[path])  # noqa: E731
    else:
        contents = {name: _PickledFile(path).tensors for name, path in files.items()}
        opener, metadata, headers = _PickledFile, {}, {}
    if weight_map is not None:
        assert index is not None
        _check_index(folder / index, weight_map, contents)
    tensors = {name: info for infos in contents.values() for name, info in infos.items()}
    file_of = {name: files[file] for file, infos in contents.items() for name in infos}
    return Checkpoint(folder, tensors, file_of, opener, metadata, mapped=bool(headers))


def _check_index(index: Path, weight_map: Mapping[str, str], contents: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """The index lists what the files hold, no more and no less, and no tensor lies in two files."""
    problems = []
    absent = [name for name, file in weight_map.items() if name not in contents[file]]
    if absent:
        problems.append(f"listed but not in their files: {', '.join(collapse(absent)[:10])}")
    first: dict[str, str] = {}
    twice: list[str] = []
    for file, infos in contents.items():
        twice += [f"{name} ({first[name]} and {file})" for name in infos if name in first]
        first.update(dict.fromkeys(infos, file))
    if twice:
        problems.append(f"in two files: {', '.join(twice[:10])}")
    unlisted = [name for name in first if name not in weight_map]
    if unlisted:
        problems.append(f"in the files but not listed: {', '.join(collapse(unlisted)[:10])}")
    if problems:
        raise CorruptCheckpointError(f"{index} contradicts its files: {'; '.join(problems)}; download them again")


class _PickledFile:
    """The tensors of a file that torch.save wrote, read by the restricted unpickler."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            head = file.read(64)
        is_zip = head.startswith(b"PK\x03\x04")
        if not is_zip and (not head or "pickle" not in stranger(head)):
            raise CorruptCheckpointError(f"{path}: not a PyTorch file: this is {stranger(head) or 'an unknown format'}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as failure:
            raise CorruptCheckpointError(
                f"{path}: cannot be loaded with weights_only: {str(failure).splitlines()[0]}"
            ) from failure
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise CorruptCheckpointError(f"{path}: expected a dictionary of tensors")
        self._state = state
        self.tensors = {
            str(name): TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.itemsize)
            for name, tensor in state.items()
        }

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        return tensor


def write_checkpoint(
    folder: Path,
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    read: Callable[[str], Tensor],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write tensors as one safetensors file or as shards with an index, as the Hub has them.

    Not atomic by itself: give it the folder that `write_folder` hands out.

    Args:
        folder: An existing folder without weights.
        tensors: (name, dtype, shape) of every tensor, in the order in which shards are filled.
        read: Gives a tensor by name. Called once for each; the tensor is let go before the next is asked for.
        max_shard_size: Bytes, or a text such as "5GB" (10^9) or "500MiB" (2^20). A larger tensor has a file of its own.
        metadata: Texts for the headers; {"format": "pt"} by default, which other libraries look for.

    Returns:
        Names of the written files.

    Raises:
        DiskFullError: The tensors do not fit; nothing was written.
        ConfigError: A size that is none.
    """
    limit = parse_size(max_shard_size)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in tensors}
    check_space(folder, sum(sizes.values()) + 4096 * (len(tensors) // 16 + 1), f"saving {len(tensors)} tensors")
    shards: list[list[tuple[str, torch.dtype, Sequence[int]]]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + sizes[tensor[0]] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += sizes[tensor[0]]
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, read, metadata=metadata or {"format": "pt"})
    if count == 1:
        return names
    weight_map = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [INDEX, *names]


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500 MiB" or 1000.

    Raises:
        ConfigError: Not a size of at least one byte.
    """
    found = (
        re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?I?B)", size.strip().upper())
        if isinstance(size, str)
        else None
    )
    num_bytes = (
        size if type(size) is int else int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    )
    if not isinstance(num_bytes, int) or num_bytes < 1:
        raise ConfigError(f"max_shard_size: {size!r} is not a size such as '5GB', '500MiB' or a number of bytes")
    return num_bytes


def write_manifest(folder: Path) -> None:
    """Write SHA256SUMS over all files of a folder; `sha256sum -c` reads it too."""
    lines = [
        f"{_sha256(path)}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    ]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def verify_manifest(folder: Path | str) -> None:
    """Compare the files of a folder with its SHA256SUMS.

    Raises:
        CorruptCheckpointError: Files that are missing or have other contents, all of them named.
        CheckpointError: There is no manifest.
    """
    folder = Path(folder)
    path = safe_file(folder, MANIFEST)
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            raise CorruptCheckpointError(f"{folder / MANIFEST}: line {number} is not a sha256 and a file name")
        name = check_name(found[2], f"{folder / MANIFEST}: line {number}")
        if not (folder / name).exists():
            problems.append(f"{name} is missing")
        elif _sha256(safe_file(folder, name)) != found[1]:
            problems.append(f"{name} has other contents")
    if problems:
        raise CorruptCheckpointError(f"{folder}: not what was saved: {'; '.join(problems)}; download it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
