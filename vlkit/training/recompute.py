"""Activation checkpointing, block by block: less memory for a second forward, or for the cheap part of it.

    checkpoint_blocks(model, every=1)            each block keeps its input only, and is run again in the backward
    checkpoint_blocks(model, every=3)            so do the first, fourth, seventh, ... of each stack
    checkpoint_blocks(model, every="selective")  each block keeps what matrix products and attention gave; the rest,
                                                 norms and activations above all, is computed again
    checkpoint_blocks(model, every=0)            as it was

`model.gradient_checkpointing = True` is `every=1`. Results are the same, bit for bit, also with experts: the router
chooses by what it is given alone, so it chooses again as it did. It works before and after `shard_model`.

Source: Chen et al., arXiv:1604.06174; selective, Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vlkit.errors import ConfigError
from vlkit.models.vlm import VisionLanguageModel

SAVED = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "experts", "attention")
"""Words in the names of operators whose outputs the selective mode keeps; "attention" is in all kinds of it."""


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
    kept = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=kept, **kwargs)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    words = operator.name().removeprefix("aten::").removeprefix("vlkit::")
    if "out" in operator._overloadname:  # writes into a tensor that is not its own
        return CheckpointPolicy.PREFER_RECOMPUTE
    found = any(words.split(".")[0] == word for word in SAVED) or "attention" in words
    return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE
