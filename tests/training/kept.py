"""How many bytes a forward leaves behind for its backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Box:
    """What the graph holds in the place of a tensor, for as long as it holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Births(TorchDispatchMode):
    """Every tensor that an operator makes, and where memory was taken for it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _memory(tree_leaves((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        self.places |= _memory(tree_leaves(out)).keys() - given.keys()
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward made and that live on, without its output: held by the graph, or by anybody."""
    boxes: weakref.WeakSet[_Box] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Box:
        box = _Box(tensor)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor), _Births() as births:
        out = run()
    alive = _memory([*(ref() for ref in births.made), *(box.tensor for box in boxes)])
    return sum(size for place, size in alive.items() if place in births.places and place not in _memory([out]))


def _memory(things: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of what tensors lie in."""
    storages = [thing.untyped_storage() for thing in things if isinstance(thing, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
