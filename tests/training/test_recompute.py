"""Blocks that are run again in the backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.steps import backward, furthest, gradient, make, shares
from vlkit.errors import ConfigError
from vlkit.training.recompute import checkpoint_blocks


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def run(name: str, **options: Any) -> tuple[Any, torch.Tensor, Counter[str]]:
    model = make(name, torch.float32)
    checkpoint_blocks(model, **options)
    with Count() as count:
        loss = backward(model, shares(model, 1, step=0)[0], 7.0)
    return model, loss, count.seen


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen-vl-tiny", "qwen3-vl-moe-tiny"])
def test_recomputing_changes_no_bit_and_selectively_no_product(name: str) -> None:
    kept, loss, count = run(name, every=0)
    products: dict[Any, int] = {}
    for every in (1, 2, "selective"):
        again, same, more = run(name, every=every)
        assert torch.equal(loss, same)
        assert furthest(kept, again, of=gradient) == 0
        assert more.total() > count.total()
        products[every] = sum(more[op] - count[op] for op in ("mm", "addmm", "bmm"))
        attentions = [op for op in count if "attention" in op and "backward" not in op]
        assert attentions
        assert (every == "selective") == all(more[op] == count[op] for op in attentions)
    assert products["selective"] == 0 < products[2] < products[1]


def test_a_choice_replaces_the_one_before() -> None:
    model = make("kimi-vl-tiny")
    model.gradient_checkpointing = True
    checkpoint_blocks(model, every=2, parts=("llm",))
    assert model.vision.gradient_checkpointing
    assert not model.llm.gradient_checkpointing
    assert ["forward" in vars(block) for block in model.llm.blocks] == [True, False]
    checkpoint_blocks(model, every=0)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.gradient_checkpointing


def test_what_cannot_be_recomputed_is_refused() -> None:
    model = make("kimi-vl-tiny")
    with pytest.raises(ConfigError, match="every='some'"):
        checkpoint_blocks(model, every="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no blocks in 'projector'"):
        checkpoint_blocks(model, parts=("projector",))
