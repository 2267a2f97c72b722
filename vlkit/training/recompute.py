"""Activation checkpointing, block by block: less memory for a second forward, or for the cheap part of it.

    checkpoint_blocks(model, every=1)            each block keeps its input only, and is run again in the backward
    checkpoint_blocks(model, every=3)            so do the first, fourth, seventh, ... of each stack
    checkpoint_blocks(model, every="selective")  each block keeps what matrix products and attention gave; the rest,
                                                 norms, activations and the experts' loop, is computed again
    checkpoint_blocks(model, every=0)            as it was

`model.gradient_checkpointing = True` is `every=1`. Results are the same, bit for bit, also with experts: the router
chooses by what it is given alone, so it chooses again as it did. It works before and after `shard_model`.

Source: Chen et al., arXiv:1604.06174; selective, Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from vlkit.errors import ConfigError
from vlkit.models.vlm import VisionLanguageModel

KEPT = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "experts"}
"""Operators whose outputs the selective mode keeps, beside all that have "attention" in their names."""


def checkpoint_blocks(
    model: VisionLanguageModel, *, every: int | Literal["selective"] = 1, parts: tuple[str, ...] = ("vision", "llm")
) -> None:
    """Choose which blocks of a model are computed again in the backward, in place of what was chosen before.

    Args:
        every: 0 for none, 1 for all, k for every k-th, or "selective".
        parts: The stacks that it is about: "vision", "llm".

    Raises:
        ConfigError: Another value, or a part that has no list of blocks.
    """
    if every != "selective" and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
        raise ConfigError(f"checkpoint_blocks: every={every!r} is neither a whole number nor 'selective'")
    for name in parts:
        part = getattr(model, name, None)
        blocks = blocks_of(part) if isinstance(part, nn.Module) else []
        if not blocks:
            raise ConfigError(f"checkpoint_blocks: the model has no blocks in {name!r}")
        part.gradient_checkpointing = False  # type: ignore[union-attr]
        for number, block in enumerate(blocks):
            block.__dict__.pop("forward", None)
            if every == "selective" or (every and number % every == 0):
                block.forward = partial(_again, block.forward, every == "selective")


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The blocks of a tower or a decoder: the members of its largest list of modules; none if it has no list."""
    lists = [m for m in part.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and num_elements(m)]
    return list(max(lists, key=num_elements)) if lists else []


def num_elements(module: nn.Module) -> int:
    """Elements of all parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def _again(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that is run a second time in the backward."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if not selective:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_keep_and_replay, **kwargs)


def _keep_and_replay() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: deque[Any] = deque()
    return _Keep(kept), _Replay(kept)


# torch's own selective contexts count every operator and need the same number of each in both passes. Where weights are
# gathered inside of a block, as those of spread experts, the second pass runs others; here only those that are kept count.


class _Keep(TorchDispatchMode):
    """Keeps the outputs of products and attention, in order."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if _is_kept(func):
            self.kept.append(tree_map(_with_version, made))
        return made


class _Replay(TorchDispatchMode):
    """Gives them back, each once, instead of running the operators again."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func):
            return func(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError(
                "a block that is recomputed selectively runs more products than in its forward, or a second backward was "
                "asked for, for which every=1 keeps what is needed"
            )
        return tree_map(_unchanged, self.kept.popleft(), is_leaf=lambda value: isinstance(value, _Kept))


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _with_version(value: Any) -> Any:
    return _Kept(value.detach(), value._version) if isinstance(value, Tensor) else value


def _unchanged(value: Any) -> Any:
    if not isinstance(value, _Kept):
        return value
    assert value.tensor._version == value.version, "a block writes into what a product or attention gave it"
    return value.tensor.detach()


def _is_kept(operator: Any) -> bool:
    space, _, name = operator.name().partition("::")
    if "out" in operator._overloadname:  # writes into a tensor that is not its own
        return False
    return space in ("aten", "vlkit") and (name.split(".")[0] in KEPT or "attention" in name)
