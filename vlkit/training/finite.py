"""Where a model first gives a number that is not finite: one reduction behind the tower, the projector and every block.

with finite_guard(model):
    model(batch).loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlkit.errors import NonFiniteError


@contextmanager
def finite_guard(model: nn.Module) -> Iterator[None]:
    """Stop at the first part whose output holds NaN or infinity, while the context is active.

    Watched are the direct parts of the model, the members of their lists of blocks, and the output heads. Each check waits for
    the device once, so this is for looking into a failure, or for every hundredth step.

    Raises:
        NonFiniteError: Names the part, how many numbers of how many are not finite, and the dtype. In fp16 most such failures are
            overflow beyond 65504, which bf16 and fp32 do not have.
    """
    handles = []
    watched = {name: part for name, part in model.named_children() if isinstance(part, nn.Module)}
    for name, part in list(watched.items()):
        for inner, child in part.named_children():
            members = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
            watched |= {".".join(filter(None, (name, inner, place))): member for place, member in members}
    for name, part in watched.items():

        def look(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise NonFiniteError(_message(name, tensor))

        handles.append(part.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _message(name: str, tensor: Tensor) -> str:
    bad = int((~tensor.isfinite()).sum())
    advice = (
        "fp16 overflows beyond 65504: use bf16 or fp32"
        if tensor.dtype == torch.float16
        else "look at its inputs, its weights and the learning rate"
    )
    return f"{name} gives {bad} of {tensor.numel()} numbers that are not finite, in {tensor.dtype}; {advice}"
