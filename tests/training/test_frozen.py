"""Frozen parts cost no memory: no activations are kept, no gradients made, no state held; and gradients pass through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vlkit
from tests.ranks import run_ranks
from tests.training.kept import kept_bytes
from tests.training.steps import shares
from vlkit.models import VisionLanguageModel
from vlkit.optim import Muon, freeze, muon_param_groups
from vlkit.optim.state import slots_of
from vlkit.testing import random_batch
from vlkit.training import TrainConfig
from vlkit.training.build import trained_parts
from vlkit.training.ranks import Ranks
from vlkit.training.recompute import checkpoint_blocks
from vlkit.training.rollouts import _evaluated

EVERY: list[Any] = [0, 1, "selective"]


def make(name: str = "kimi-vl-tiny", **overrides: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model(name, **overrides).train()


def loss(model: VisionLanguageModel) -> torch.Tensor:
    found = model(random_batch(model)).loss
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2.5-vl-tiny", "qwen3-vl-moe-tiny", "andesvl-siglip2-tiny"])
def test_a_frozen_tower_keeps_nothing(name: str) -> None:
    model = make(name)
    patches = random_batch(model).patches
    assert patches is not None
    for every in EVERY:
        checkpoint_blocks(model, every=every)
        model.requires_grad_(True)
        whole = kept_bytes(lambda: loss(model))
        tower = kept_bytes(lambda: model.vision(patches).tokens)
        freeze(model, ["vision"])
        assert tower > 0
        assert kept_bytes(lambda: model.vision(patches).tokens) == 0
        rest = kept_bytes(lambda: loss(model))
        assert rest < whole  # the projector and the decoder keep theirs
        freeze(model, ["projector"])
        assert kept_bytes(lambda: model.encode_images(patches).tokens) == 0


@pytest.mark.parametrize("every", EVERY)
def test_blocks_below_the_first_that_learns_keep_nothing(every: Any) -> None:
    def kept(num_layers: int) -> int:
        config = make("qwen2-vl-tiny").config.llm.replace(num_layers=num_layers)
        model = make("qwen2-vl-tiny", llm=config)
        checkpoint_blocks(model, every=every)
        freeze(model, [""], thaw=[f"llm.blocks.{num_layers - 1}"])
        return kept_bytes(lambda: loss(model))

    assert abs(kept(2) - kept(4)) < 100  # the input of one block alone is thousands


@pytest.mark.parametrize("every", EVERY)
def test_a_frozen_decoder_passes_gradients_and_keeps_less(every: Any) -> None:
    gradients, kept = [], []
    for frozen in ([], ["vision", "llm"]):
        model = make()
        checkpoint_blocks(model, every=every)
        freeze(model, frozen)
        kept.append(kept_bytes(lambda model=model: loss(model)))  # type: ignore[misc]
        loss(model).backward()
        gradients.append([p.grad for p in model.projector.parameters()])
        assert all(
            (p.grad is None) == any(name.startswith(part) for part in frozen) for name, p in model.named_parameters()
        )
    assert all(torch.equal(one, two) and one.abs().max() > 0 for one, two in zip(*gradients, strict=True))
    assert kept[1] < kept[0]


def test_a_batch_without_images_leaves_a_frozen_tower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    freeze(model, ["vision", "projector"])
    monkeypatch.setattr(model, "encode_images", None)  # would fail if it were called
    found = model(random_batch(model, [(7, [])])).loss
    found.backward()
    assert model.llm.embedding.weight.grad is not None


def test_frozen_parts_are_in_evaluation_mode_also_after_rollouts() -> None:
    """Nothing of them is random, such as dropped paths, and the rest trains."""
    model = make()
    config = TrainConfig.from_dict(
        {
            "run": "run",
            "model": {"name": "kimi-vl-tiny"},
            "data": {"files": ["x.jsonl"]},
            "steps": 1,
            "train": ["projector"],
        }
    )
    whole = trained_parts(model, None, config, Ranks(0, 1, torch.device("cpu")))
    for _ in range(2):
        assert not any(module.training for part in (model.vision, model.llm) for module in part.modules())
        assert all(module.training for module in model.projector.modules())
        with _evaluated(whole):
            assert not any(module.training for module in whole.modules())


def held(rank: int, world: int, frozen: list[str]) -> tuple[int, int]:
    """Elements of the optimizer's state on this rank, after two steps, and of what is trained."""
    import torch.distributed as dist

    model = make()
    freeze(model, frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    over_ranks: dict[str, Any] = (
        {} if world == 1 else {"process_group": dist.group.WORLD, "grad_sync": "reduce_scatter"}
    )
    optimizer = Muon(muon_param_groups(model), lr=1e-3, **over_ranks)
    for step in range(2):
        out = model(shares(model, world, step)[rank])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.grad is None
    return sum(slot.tensor.numel() for slot in slots_of(optimizer)), sum(
        p.numel() for p in optimizer_parameters(optimizer)
    )


def optimizer_parameters(optimizer: Muon) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("changes", "learn"),
    [
        ({}, {"vision", "task"}),
        ({"optimizer": {"thaw": ["projector"]}}, {"vision", "projector", "task"}),
        ({"optimizer": {"freeze": ["task"]}}, {"vision"}),
        ({"train": ["vision", "llm"]}, {"vision", "llm"}),
    ],
)
def test_beside_adapters_only_what_is_named_learns(changes: dict[str, Any], learn: set[str]) -> None:
    model = make()
    model.vision.blocks[0].attn.lora_A = nn.ModuleDict({"default": nn.Linear(4, 4)})
    values = {"run": "r", "model": {"name": "kimi-vl-tiny"}, "data": {"files": ["a.jsonl"]}, "steps": 1}
    config = TrainConfig.from_dict({**values, "lora": {"parts": ["vision"]}, **changes})
    whole = trained_parts(model, nn.Linear(2, 2), config, Ranks(0, 1, torch.device("cpu")))
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == learn
    assert all(".lora_A." in name for name in trained if name.startswith("vision."))


def test_frozen_parts_have_no_state() -> None:
    everything, trained = held(0, 1, []), held(0, 1, ["llm", "vision"])
    assert trained[1] == sum(p.numel() for p in make().projector.parameters())
    assert everything[0] > 5 * trained[0] > 0
    assert trained[0] < 2.1 * trained[1]  # momentum of matrices, two moments of vectors, and how often


@pytest.mark.slow
def test_ranks_hold_their_share_of_the_state_of_what_trains() -> None:
    alone = held(0, 1, ["llm", "vision"])
    both = run_ranks(held, 2, 2, ["llm", "vision"])
    assert sum(state for state, _ in both) <= 1.1 * alone[0]
