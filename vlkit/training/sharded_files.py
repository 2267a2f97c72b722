"""Tensors of several ranks in a folder: every rank writes what it holds, any number of ranks reads it, nothing is unpickled.

    shard-00000-of-00004.safetensors    pieces, each named by its tensor and its place: "head.weight[0:3,0:64]"
    index.json                          every tensor with dtype, shape and pieces; every piece with its file and checksum

The index is written last. A tensor is whatever `pieces_of` understands: a plain tensor, equal on all ranks, of which one rank
stores it all; a DTensor, under FSDP2 for example; a `Part` of an optimizer's state. Each can be loaded as any other.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.errors import CheckpointError, CorruptCheckpointError, DiskFullError, KeyMismatchError
from vlkit.hub.atomic import NO_SPACE, check_space, sync
from vlkit.hub.safetensors_file import MappedFile, read_header, write_safetensors
from vlkit.hub.strict_json import read_json
from vlkit.optim.agree import gather_json, num_ranks_in, raise_together, rank_in, world
from vlkit.optim.parts import Box, checksum, is_first_copy, pieces_of, whole_shape

VERSION = 1
INDEX = "index.json"
MAX_INDEX_BYTES = 2**30
_SHOWN = 5  # names in a message

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Stored:
    """One piece in a file."""

    file: str
    box: Box
    crc32: int


def save_shards(folder: Path | str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Collective. Write the tensors into a folder, each rank what it holds, and sync it to the disk.

    To replace an older save whole or not at all, write into a fresh folder and rename it afterwards.

    Args:
        folder: Made if it does not exist; has no shards yet. All ranks see the same folder.
        tensors: The same names on every rank.
        group: The ranks; None is all.

    Raises:
        DiskFullError: Not enough space.
        CheckpointError: The folder cannot be written, or ranks have other tensors. Whatever fails on one rank is raised on all.
    """
    folder, group = Path(folder), group or world()
    rank, num_ranks = rank_in(group), num_ranks_in(group)
    table = {name: _described(tensor) for name, tensor in tensors.items()}
    mine = {
        _key(name, box): (name, box, view)
        for index, (name, tensor) in enumerate(tensors.items())
        if is_first_copy(tensor, index, rank, num_ranks)
        for box, view in pieces_of(tensor)
    }
    file = f"shard-{rank:05d}-of-{num_ranks:05d}.safetensors"
    needed = gather_json([_fingerprint(table), sum(view.nbytes for _, _, view in mine.values())], group)
    checksums: dict[str, int] = {}

    def read(key: str) -> Tensor:
        local = mine[key][2].cpu().contiguous()
        checksums[key] = checksum(local)
        return local

    def write() -> None:
        if len({fingerprint for fingerprint, _ in needed}) > 1:
            raise CheckpointError(
                f"{folder}: ranks have different tensors, or dtypes or shapes: they run different models"
            )
        check_space(folder, sum(size for _, size in needed), f"saving to {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        layout = [(key, view.dtype, tuple(view.shape)) for key, (_, _, view) in mine.items()]
        write_safetensors(folder / file, layout, read)
        sync(folder / file)

    _together(write, folder, group)
    stored: dict[str, list[Any]] = {name: [] for name in tensors}
    for theirs in gather_json([(n, file, b.offsets, b.sizes, checksums[k]) for k, (n, b, _) in mine.items()], group):
        for name, *piece in theirs:
            stored[name].append(piece)

    def write_index() -> None:
        if rank == 0:
            entries = {name: {**table[name], "pieces": stored[name]} for name in tensors}
            with (folder / INDEX).open("x", encoding="utf-8") as out:
                json.dump({"version": VERSION, "num_ranks": num_ranks, "tensors": entries}, out, separators=(",", ":"))
            sync(folder / INDEX)
            sync(folder)

    _together(write_index, folder, group)


@torch.no_grad()
def load_shards(folder: Path | str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Collective. Fill the tensors from a folder that any number of ranks has written; every rank reads what it holds.

    Names, dtypes, shapes, completeness and checksums are verified on all ranks before anything is written to a tensor.

    Args:
        folder: As written by save_shards.
        tensors: Exactly the saved names; filled in place.
        group: The ranks; None is all.

    Raises:
        KeyMismatchError: Missing or unknown names, other shapes or dtypes.
        CorruptCheckpointError: A file is missing, damaged or incomplete. Whatever fails on one rank is raised on all.
    """
    folder, group = Path(folder), group or world()
    copies: list[tuple[Tensor, Tensor]] = []

    def plan() -> None:
        index = read_index(folder)
        _check_names(folder, index, tensors)
        files: dict[str, MappedFile] = {}
        for name, tensor in tensors.items():
            pieces = _pieces(folder, name, index[name])
            for box, view in pieces_of(tensor):
                for stored in pieces:
                    common = box.overlap(stored.box)
                    if common is not None:
                        source = _read(folder, name, stored, view.dtype, files)
                        copies.append((common.of(view, box), common.of(source, stored.box)))

    _together(plan, folder, group)
    for target, source in copies:
        target.copy_(source)


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape", "pieces"} of what a folder holds.

    Raises:
        CorruptCheckpointError: No index, or a damaged one.
    """
    index = read_json(folder / INDEX, error=CorruptCheckpointError, max_bytes=MAX_INDEX_BYTES)
    if index.get("version") != VERSION:
        raise CorruptCheckpointError(
            f"{folder / INDEX}: version {index.get('version')!r}, this release reads {VERSION}; was it written by a newer one?"
        )
    tensors = index.get("tensors")
    if not isinstance(tensors, dict):
        raise CorruptCheckpointError(f"{folder / INDEX}: expected a table of tensors, found {type(tensors).__name__}")
    return tensors


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(whole_shape(tensor))}


def _fingerprint(table: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(table, sort_keys=False).encode())


def _key(name: str, box: Box) -> str:
    places = ",".join(f"{first}:{first + size}" for first, size in zip(box.offsets, box.sizes, strict=True))
    return f"{name}[{places}]"


def _together(work: Callable[[], Result], folder: Path, group: dist.ProcessGroup | None) -> Result | None:
    """Run on every rank; what fails on one is raised on all."""
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except CheckpointError as error:
        failure = error
    except OSError as error:
        kind = DiskFullError if error.errno in NO_SPACE else CheckpointError
        failure = kind(f"{folder}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else ""))
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = error
    raise_together(failure, group)
    return result


def _check_names(folder: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in tensors if name not in index]
    foreign = [name for name in index if name not in tensors]
    if missing or foreign:
        raise KeyMismatchError(
            f"{folder} holds {len(index)} tensors, {len(tensors)} are wanted: "
            f"missing {_listed(missing)}; not wanted {_listed(foreign)}. Was it saved by the same model and optimizer?"
        )
    for name, tensor in tensors.items():
        found, wanted = {key: index[name].get(key) for key in ("dtype", "shape")}, _described(tensor)
        if found != wanted:
            raise KeyMismatchError(
                f"{folder}: {name!r} is {found['dtype']} {found['shape']}, "
                f"wanted is {wanted['dtype']} {wanted['shape']}"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(map(repr, names[:_SHOWN]))}{more})" if names else "none"


def _pieces(folder: Path, name: str, entry: Mapping[str, Any]) -> list[_Stored]:
    """The pieces of one tensor, which together are all of it."""
    try:
        pieces = [
            _Stored(str(file), Box(tuple(map(int, offsets)), tuple(map(int, sizes))), int(crc32))
            for file, offsets, sizes, crc32 in entry["pieces"]
        ]
        whole = Box((0,) * len(entry["shape"]), tuple(entry["shape"]))
        inside = all(piece.box.overlap(whole) == piece.box for piece in pieces)
    except (KeyError, TypeError, ValueError) as bad:
        raise CorruptCheckpointError(f"{folder / INDEX}: tensor {name!r}: cannot be understood: {bad}") from None
    for piece in pieces:
        if Path(piece.file).name != piece.file or not inside:
            raise CorruptCheckpointError(f"{folder / INDEX}: tensor {name!r}: a piece lies outside ({piece})")
    held = sum(piece.box.numel for piece in pieces)
    if held != whole.numel or any(a.box.overlap(b.box) for a, b in _neighbours(pieces)):
        raise CorruptCheckpointError(
            f"{folder / INDEX}: tensor {name!r}: its pieces have {held} elements, the tensor has {whole.numel}, or they overlap"
        )
    return pieces


def _neighbours(pieces: list[_Stored]) -> Iterator[tuple[_Stored, _Stored]]:
    """Pairs that may overlap: those that do on the axis along which the tensor is cut most."""
    if len(pieces) < 2:
        return
    axis = max(range(len(pieces[0].box.offsets)), key=lambda axis: len({piece.box.offsets[axis] for piece in pieces}))
    ordered = sorted(pieces, key=lambda piece: piece.box.offsets[axis])
    for index, piece in enumerate(ordered):
        end = piece.box.offsets[axis] + piece.box.sizes[axis]
        for other in itertools.islice(ordered, index + 1, None):
            if other.box.offsets[axis] >= end:
                break
            yield piece, other


def _read(folder: Path, name: str, stored: _Stored, dtype: torch.dtype, files: dict[str, MappedFile]) -> Tensor:
    """One piece, verified."""
    path, key = folder / stored.file, _key(name, stored.box)
    if stored.file not in files:
        if not path.is_file():
            raise CorruptCheckpointError(f"{path}: missing; {INDEX} says that it holds {key!r}")
        files[stored.file] = MappedFile(read_header(path))
    info = files[stored.file].header.tensors.get(key)
    if info is None or info.dtype != dtype or info.shape != stored.box.sizes:
        raise CorruptCheckpointError(
            f"{path}: {key!r} should be {dtype} {stored.box.sizes}, found "
            + (f"{info.dtype} {info.shape}" if info else "no such tensor")
        )
    tensor = files[stored.file].read(key)
    if checksum(tensor) != stored.crc32:
        raise CorruptCheckpointError(
            f"{path}: {key!r} has another checksum than when it was saved: the file is damaged"
        )
    return tensor
