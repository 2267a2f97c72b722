"""Tiny checkpoint files that the tests of this folder write themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkit.hub.checkpoint import write_checkpoint
from vlkit.hub.safetensors_file import write_safetensors


def write_file(path: Path, state: Mapping[str, Tensor]) -> Path:
    """One safetensors file."""
    write_safetensors(path, [(n, t.dtype, t.shape) for n, t in state.items()], state.__getitem__)
    return path


def write_folder_of(folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> Path:
    """A checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [(n, t.dtype, t.shape) for n, t in state.items()]
    write_checkpoint(folder, tensors, state.__getitem__, max_shard_size=max_shard_size)
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: a text, bytes, or something that is written as JSON."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """The header's entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, types, shapes and bytes: NaN payloads and negative zeros count."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
