"""Models sharded over ranks train as one process does.

Measured over all tiny families, Muon and AdamW, 2 and 3 ranks, 5 steps of 1e-3: after them parameters lie at most 4e-13 apart
in fp64. In fp32 it is 2e-4 for qwen-vl-tiny and 6e-5 for the others, where AdamW blows up gradients that are nothing but
rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.ranks import all_of, run_ranks
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
from vlkit.models.factory import create_model
from vlkit.packing import Batch
from vlkit.registry import list_models
from vlkit.testing import random_batch
from vlkit.training.gathering import gather_model
from vlkit.training.recompute import blocks_of, checkpoint_blocks
from vlkit.training.sharding import make_mesh, shard_model

FAMILIES = list_models("*-tiny")
APART = {torch.float64: 1e-11, torch.float32: 6e-4}


Case = tuple[str, torch.dtype, Optimizer, dict[str, int]]


def trained(rank: int, num_ranks: int, cases: list[Case]) -> list[float]:
    """How far apart 5 steps end on two ranks, 2 on more; on rank 0, which also trains alone."""
    found, steps = [], 5 if num_ranks == 2 else 2
    for name, dtype, optimizer, axes in cases:
        ours = shard_model(make(name, dtype), make_mesh(**axes))
        state = gather_model(train_share(ours, rank, num_ranks, steps=steps, optimizer=optimizer))
        if rank == 0:
            theirs = train_whole(make(name, dtype), num_ranks, steps=steps, optimizer=optimizer)
            found.append(max(float((state[n] - p.detach()).abs().max()) for n, p in theirs.named_parameters()))
    return found


CASES: dict[int, list[Case]] = {
    2: [
        *((name, torch.float64, muon, {}) for name in FAMILIES),
        ("kimi-vl-tiny", torch.float32, muon, {}),
        ("qwen-vl-tiny", torch.float32, adamw, {}),
        ("qwen3-vl-moe-tiny", torch.float64, muon, {"expert_parallel": 2}),
    ],
    3: [
        ("qwen3-vl-tiny", torch.float64, muon, {}),
        ("kimi-vl-tiny", torch.float64, adamw, {"expert_parallel": 3}),
    ],
    4: [
        ("qwen3-vl-moe-tiny", torch.float64, muon, {"replicate": 2}),
        ("kimi-vl-tiny", torch.float64, muon, {"expert_parallel": 2}),
        ("kimi-vl-tiny", torch.float64, muon, {"expert_parallel": 2, "replicate": 2}),
    ],
}


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_training_over_ranks_equals_one_process(num_ranks: int) -> None:
    """Rank 1 has no image, rank 3 no target, all have other numbers of tokens, and of 5 experts each has other ones."""
    found = run_ranks(trained, num_ranks, num_ranks, CASES[num_ranks], timeout=240)[0]
    for (name, dtype, _, axes), apart in zip(CASES[num_ranks], found, strict=True):
        assert apart <= APART[dtype], f"{name} {axes}: {apart:.1e}"


@pytest.fixture(scope="module")
def on_two() -> dict[str, list[Any]]:
    """What each work gives on two ranks, by its name."""
    works = [what_is_sharded, without_images, nothing_to_learn, in_pieces, recomputed, narrow, answers, refused]
    found = run_ranks(all_of, 2, [(work, ()) for work in works])
    return {work.__name__: list(results) for work, results in zip(works, zip(*found, strict=True), strict=True)}


def what_is_sharded(rank: int) -> dict[str, tuple[float, int]]:
    found = {}
    for name in FAMILIES:
        model = shard_model(create_model(name, device="meta"), make_mesh())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        groups = sum(hasattr(module, "set_requires_gradient_sync") for module in model.modules())
        found[name] = local / model.num_parameters(), groups - len(blocks_of(model.vision)) - len(blocks_of(model.llm))
    return found


def test_every_rank_holds_its_share_in_groups_of_one_block(on_two: dict[str, list[Any]]) -> None:
    """Nearly half each: single rows of odd matrices are left to the first rank."""
    for found in on_two["what_is_sharded"]:
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


def test_ranks_without_images_take_part(on_two: dict[str, list[Any]]) -> None:
    for found in on_two["without_images"]:
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


def test_a_rank_without_any_target_adds_nothing(on_two: dict[str, list[Any]]) -> None:
    (apart, _), (_, total) = on_two["nothing_to_learn"]
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


def test_accumulated_gradients_equal_one_large_batch(on_two: dict[str, list[Any]]) -> None:
    assert max(on_two["in_pieces"]) < 1e-13


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


def test_recomputing_a_sharded_model_changes_no_bit(on_two: dict[str, list[Any]]) -> None:
    assert on_two["recomputed"] == [[True] * 12] * 2


def narrow(rank: int) -> dict[str, tuple[float, float, set[torch.dtype]]]:
    """bf16 inside, fp32 outside, against a model that is bf16 throughout: the same forward."""
    found = {}
    for name in ("kimi-vl-tiny", "qwen2.5-vl-tiny", "andesvl-tiny"):
        ours = shard_model(make(name, torch.float32), make_mesh(), param_dtype=torch.bfloat16)
        theirs, wide = make(name, torch.float32).to(torch.bfloat16), make(name, torch.float32)
        batches = shares(wide, 2, step=0)
        loss = backward(ours, batches[rank], num_targets(batches) / 2)
        backward(wide, Batch.concat(batches), num_targets(batches))
        with torch.no_grad():
            out = theirs(batches[rank])
        scale = max(float(p.grad.abs().max()) for p in wide.parameters() if p.grad is not None)
        dtypes = {tensor.dtype for p in ours.parameters() for tensor in (p, p.grad) if tensor is not None}
        dtypes |= {buffer.dtype for buffer in ours.buffers()}
        apart = abs(float(loss) - float(out.loss * out.num_targets))
        found[name] = apart, furthest(ours, wide, of=gradient) / scale, dtypes
    return found


def test_mixed_precision_computes_in_bf16_and_keeps_fp32(on_two: dict[str, list[Any]]) -> None:
    """Largest seen: gradients 1.2e-2 of the largest of them, with bf16's 4e-3 per rounding."""
    for found in on_two["narrow"]:
        for name, (apart, of_gradients, dtypes) in found.items():
            assert apart == 0, name
            assert of_gradients < 3e-2, name
            assert dtypes == {torch.float32}, name


def answers(rank: int) -> bool:
    ours, theirs = shard_model(make("kimi-vl-tiny"), make_mesh()).eval(), make("kimi-vl-tiny").eval()
    batch = random_batch(theirs, [(5, [(1, 2)]), (4, [])] if rank == 0 else [(6, [])], labels=False)
    settings = {"max_new_tokens": 3, "stop": ()}
    return ours.generate(batch, **settings) == theirs.generate(batch, **settings)


def test_a_sharded_model_answers(on_two: dict[str, list[Any]]) -> None:
    """Ranks must take the same number of steps; here all take three."""
    assert all(on_two["answers"])


def refused(rank: int) -> list[str]:
    said = []
    for options in ({"replicate": 3}, {"expert_parallel": 0}):
        with pytest.raises(ConfigError) as found:
            make_mesh(**options)
        said.append(str(found.value))
    with pytest.raises(ConfigError, match="make_mesh"):
        shard_model(make("kimi-vl-tiny"), dist.init_device_mesh("cpu", (2,)))
    return said


def test_other_modules_and_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"found Linear; shard other modules with torch\.distributed\.fsdp\.fully_shard"
    ):
        shard_model(torch.nn.Linear(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="replicate is a number of ranks, expected an int, found '2'"):
        make_mesh(replicate="2")  # type: ignore[arg-type]


def test_meshes_that_cannot_be_are_refused(on_two: dict[str, list[Any]]) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        make_mesh()
    for one, two in on_two["refused"]:
        assert "2 ranks" in one
        assert "expert_parallel=0" in two
