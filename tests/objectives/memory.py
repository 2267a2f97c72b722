"""Counts what operators make, without a clock or the system's word for it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """While it is entered: the largest tensor that an operator gave, and the most bytes of all of them alive at once.

    Attributes:
        largest: Elements.
        peak: Bytes; storages that views share are counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[int, list[int]] = {}  # storage -> [tensors on it, bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        foreign = {key for key in map(_storage, given) if key not in self._alive}  # made before, and so are views of it
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in foreign:
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        key = _storage(tensor)
        self._alive.setdefault(key, [0, tensor.untyped_storage().nbytes()])[0] += 1
        weakref.finalize(tensor, self._drop, key)
        self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))

    def _drop(self, key: int) -> None:
        self._alive[key][0] -= 1
        if not self._alive[key][0]:
            del self._alive[key]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
