"""Models sharded over ranks train as one process does.

Measured over all tiny families, Muon and AdamW, 2 and 3 ranks, 5 steps of 1e-3: after them parameters lie at most 4e-13 apart
in fp64. In fp32 it is 2e-4 for qwen-vl-tiny and 6e-5 for the others, where AdamW blows up gradients that are nothing but
rounding.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.ranks import run_ranks
from tests.training.steps import (
    Optimizer,
    adamw,
    backward,
    furthest,
    gradient,
    make,
    muon,
    num_targets,
    shares,
    train_share,
    train_whole,
)
from vlkit.errors import ConfigError
from vlkit.packing import Batch
from vlkit.registry import list_models
from vlkit.testing import random_batch
from vlkit.training.recompute import blocks_of, checkpoint_blocks
from vlkit.training.sharding import make_mesh, shard_model

FAMILIES = list_models("*-tiny")
APART = {torch.float64: 1e-11, torch.float32: 6e-4}


def trained(
    rank: int, num_ranks: int, names: list[str], dtype: torch.dtype, optimizer: Optimizer, replicate: int
) -> dict[str, float]:
    found = {}
    for name in names:
        ours = shard_model(make(name, dtype), make_mesh(replicate=replicate))
        train_share(ours, rank, num_ranks, optimizer=optimizer)
        found[name] = furthest(ours, train_whole(make(name, dtype), num_ranks, optimizer=optimizer))
    return found


@pytest.mark.parametrize(
    ("num_ranks", "names", "dtype", "optimizer", "replicate"),
    [
        (2, FAMILIES, torch.float64, muon, 1),
        (2, ["kimi-vl-tiny", "qwen-vl-tiny"], torch.float32, adamw, 1),
        (3, ["kimi-vl-tiny", "qwen3-vl-tiny"], torch.float64, muon, 1),
        (4, ["qwen3-vl-moe-tiny"], torch.float64, muon, 2),
    ],
)
def test_training_over_ranks_equals_one_process(
    num_ranks: int, names: list[str], dtype: torch.dtype, optimizer: Optimizer, replicate: int
) -> None:
    """Rank 1 has no image, rank 3 no target, and all have different numbers of tokens."""
    for found in run_ranks(trained, num_ranks, num_ranks, names, dtype, optimizer, replicate):
        assert found.keys() == set(names)
        for name, apart in found.items():
            assert apart <= APART[dtype], f"{name}: {apart:.1e}"


def what_is_sharded(rank: int) -> dict[str, tuple[float, int]]:
    found = {}
    for name in FAMILIES:
        model = shard_model(make(name), make_mesh())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        groups = sum(hasattr(module, "set_requires_gradient_sync") for module in model.modules())
        found[name] = local / model.num_parameters(), groups - len(blocks_of(model.vision)) - len(blocks_of(model.llm))
    return found


def test_every_rank_holds_its_share_in_groups_of_one_block() -> None:
    """Nearly half each: single rows of odd matrices are left to the first rank."""
    for found in run_ranks(what_is_sharded, 2):
        for name, (share, more_groups) in found.items():
            assert 0.45 < share < 0.55, name
            assert more_groups in (1, 2), name  # the root, and a projector that is as large as a block


def without_images(rank: int) -> dict[str, tuple[float, bool]]:
    """Only rank 0 has images; with gradients and without; with parts that are frozen."""
    found = {}
    for frozen in ("", "vision", "vision projector", "llm"):
        ours, theirs = make("qwen3-vl-tiny"), make("qwen3-vl-tiny")
        for model in (ours, theirs):
            for part in frozen.split():
                getattr(model, part).requires_grad_(False)
        shard_model(ours, make_mesh())
        batches = shares(theirs, 2, step=0)
        with torch.no_grad():
            same = torch.equal(ours(batches[rank]).loss, theirs(batches[rank]).loss)
        backward(ours, batches[rank], num_targets(batches) / 2)
        backward(theirs, Batch.concat(batches), num_targets(batches))
        found[frozen] = furthest(ours, theirs, of=gradient), same
    return found


def test_ranks_without_images_take_part() -> None:
    for found in run_ranks(without_images, 2):
        for frozen, (apart, same) in found.items():
            assert apart < 1e-13, frozen
            assert same, frozen


def nothing_to_learn(rank: int) -> tuple[float, float]:
    ours, theirs = shard_model(make("kimi-vl-tiny"), make_mesh()), make("kimi-vl-tiny")
    batches = shares(theirs, 2, step=0)
    assert batches[1].labels is not None
    batches[1].labels.fill_(-100)
    total = backward(ours, batches[rank], num_targets(batches) / 2)
    backward(theirs, Batch.concat(batches), num_targets(batches))
    return furthest(ours, theirs, of=gradient), float(total)


def test_a_rank_without_any_target_adds_nothing() -> None:
    (apart, _), (_, total) = run_ranks(nothing_to_learn, 2)
    assert apart < 1e-13
    assert total == 0


def in_pieces(rank: int) -> float:
    ours, theirs = shard_model(make("kimi-vl-tiny"), make_mesh()), make("kimi-vl-tiny")
    batches = [shares(theirs, 2, step) for step in range(3)]
    count = sum(num_targets(both) for both in batches)
    for step, both in enumerate(batches):
        ours.set_requires_gradient_sync(step == 2)  # type: ignore[operator]
        backward(ours, both[rank], count / 2)
    backward(theirs, Batch.concat([batch for both in batches for batch in both]), count)
    return furthest(ours, theirs, of=gradient)


def test_accumulated_gradients_equal_one_large_batch() -> None:
    assert max(run_ranks(in_pieces, 2)) < 1e-13


def recomputed(rank: int) -> list[bool]:
    """Every other way to recompute, before sharding and after; experts on one rank and on two."""
    same = []
    for expert_parallel in (1, 2):
        mesh = make_mesh(expert_parallel=expert_parallel)
        kept, *again = (make("kimi-vl-tiny", torch.float32) for _ in range(4))
        checkpoint_blocks(again[0], every="selective")
        for model in (kept, *again):
            shard_model(model, mesh, param_dtype=torch.bfloat16)
        checkpoint_blocks(again[1], every=2)
        again[2].gradient_checkpointing = True
        batches = shares(kept, 2, step=0)
        loss = backward(kept, batches[rank], 3.0)
        for model in again:
            same.append(torch.equal(loss, backward(model, batches[rank], 3.0)))
            same.append(furthest(kept, model, of=gradient) == 0)
    return same


def test_recomputing_a_sharded_model_changes_no_bit() -> None:
    assert run_ranks(recomputed, 2) == [[True] * 12] * 2


def narrow(rank: int) -> tuple[float, float, set[torch.dtype]]:
    """bf16 inside, fp32 outside, against a model that is bf16 throughout: the same forward."""
    ours = shard_model(make("kimi-vl-tiny", torch.float32), make_mesh(), param_dtype=torch.bfloat16)
    theirs = make("kimi-vl-tiny", torch.float32).to(torch.bfloat16)
    wide = make("kimi-vl-tiny", torch.float32)
    batches = shares(wide, 2, step=0)
    loss = backward(ours, batches[rank], num_targets(batches) / 2)
    backward(wide, Batch.concat(batches), num_targets(batches))
    out = theirs(batches[rank])
    scale = max(float(p.grad.abs().max()) for p in wide.parameters() if p.grad is not None)
    dtypes = {tensor.dtype for p in ours.parameters() for tensor in (p, p.grad) if tensor is not None}
    assert ours.llm.blocks[1].mlp.router.bias.dtype == torch.float32
    apart = furthest(ours, wide, of=gradient) / scale
    return abs(float(loss) - float((out.loss * out.num_targets).detach())), apart, dtypes


def test_mixed_precision_computes_in_bf16_and_keeps_fp32() -> None:
    """Largest seen: gradients 1e-2 of the largest of them, with bf16's 4e-3 per rounding."""
    for apart, of_gradients, dtypes in run_ranks(narrow, 2):
        assert apart == 0
        assert of_gradients < 3e-2
        assert dtypes == {torch.float32}


def answers(rank: int) -> bool:
    ours, theirs = shard_model(make("kimi-vl-tiny"), make_mesh()).eval(), make("kimi-vl-tiny").eval()
    batch = random_batch(theirs, [(5, [(1, 2)]), (4, [])] if rank == 0 else [(6, [])], labels=False)
    settings = {"max_new_tokens": 3, "stop": ()}
    return ours.generate(batch, **settings) == theirs.generate(batch, **settings)


def test_a_sharded_model_answers() -> None:
    """Ranks must take the same number of steps; here all take three."""
    assert all(run_ranks(answers, 2))


def refused(rank: int) -> list[str]:
    said = []
    for options in ({"replicate": 3}, {"expert_parallel": 0}):
        with pytest.raises(ConfigError) as found:
            make_mesh(**options)
        said.append(str(found.value))
    with pytest.raises(ConfigError, match="make_mesh"):
        shard_model(make("kimi-vl-tiny"), dist.init_device_mesh("cpu", (2,)))
    return said


def test_meshes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        make_mesh()
    for one, two in run_ranks(refused, 2):
        assert "2 ranks" in one
        assert "expert_parallel=0" in two
