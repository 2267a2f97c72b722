"""Which files of a folder hold its weights, by the names that the Hub uses.

    model.safetensors                                                         one file
    model.safetensors.index.json -> model-00001-of-00007.safetensors, ...     many
    pytorch_model.bin, pytorch_model.bin.index.json                           pickled; only where they are asked for

Reads no tensor and needs no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlkit.errors import CheckpointError, CorruptCheckpointError
from vlkit.hub.safe_files import check_name, safe_file
from vlkit.hub.strict_json import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MANIFEST = "SHA256SUMS"


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[str]:
    """Names of the files that hold the weights; the index is the first where there is one.

    Args:
        folder: A checkpoint folder.
        allow_pickle: Also consider `pytorch_model.bin`.

    Raises:
        CheckpointError: No weights; or files that the index names are missing: all of them are listed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    present = {path.name for path in folder.iterdir()}
    pickled = sorted(present & {PICKLE, PICKLE_INDEX})
    for single, index in [(WEIGHTS, INDEX)] + ([(PICKLE, PICKLE_INDEX)] if allow_pickle else []):
        if single in present:
            return [single]
        if index in present:
            shards = shards_of(folder, index)
            missing = [name for name in shards if name not in present]
            if missing:
                raise CheckpointError(
                    f"{folder}: {len(missing)} of {len(shards)} files that {index} names are missing: "
                    f"{', '.join(missing)}; download them again"
                )
            return [index, *shards]
    others = sorted(name for name in present if name.endswith(".safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(f"{folder}: no {INDEX} says how {', '.join(others)} belong together")
    if pickled:
        raise CheckpointError(
            f"{folder}: the weights are pickled ({', '.join(pickled)}), and a pickle can hold more than tensors; "
            f"convert them to safetensors, or allow them by allow_pickle=True (loaded with weights_only)"
        )
    if ".metadata" in present and any(name.endswith(".distcp") for name in present):
        raise CheckpointError(
            f"{folder}: a distributed checkpoint of torch, whose table of contents is a pickle; gather it with the program "
            f"that wrote it, and save safetensors"
        )
    raise CheckpointError(
        f"{folder}: no weights: neither {WEIGHTS} nor {INDEX}; it has {', '.join(sorted(present)[:20]) or 'no files'}. "
        f"Where a repository has only pickled weights ({PICKLE}), allow_pickle=True fetches and loads them"
    )


def shards_of(folder: Path, index: str) -> list[str]:
    """Names of the files that an index lists, in its order, whether they are there or not."""
    return list(dict.fromkeys(read_index(folder, index).values()))


def read_index(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file name.

    Raises:
        CorruptCheckpointError: No such table in it.
        UnsafePathError: A file name that would leave the folder.
    """
    path = safe_file(folder, index)
    weight_map = read_json(path, error=CorruptCheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{folder / index}: expected a weight_map of tensor names to file names")
    suffixes = (".safetensors",) if index == INDEX else (".bin",)
    first = {repr(file): tensor for tensor, file in reversed(weight_map.items())}  # each name is checked once
    where = f"{folder / index}: tensor"
    for tensor in first.values():
        check_name(weight_map[tensor], f"{where} {tensor!r}", suffixes=suffixes)
    return weight_map


def is_weight_file(name: str) -> bool:
    """Whether a name in a folder belongs to the weights of a save, pickled or not, which the next save replaces."""
    shard = r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin"
    return bool(re.fullmatch(shard, name)) or name in (INDEX, PICKLE_INDEX, MANIFEST)
