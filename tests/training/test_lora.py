"""Adapters through PEFT: where they are, what trains, merging, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlkit
from tests.ranks import run_ranks
from tests.training.steps import num_targets, shares
from vlkit.errors import CheckpointError, ConfigError, KeyMismatchError
from vlkit.models import VisionLanguageModel
from vlkit.optim import Muon, muon_param_groups
from vlkit.packing import Batch
from vlkit.testing import random_batch
from vlkit.training.lora import (
    LoraOptions,
    add_lora,
    has_lora,
    is_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    without_lora,
)
from vlkit.training.lora_files import load_adapter, save_adapter
from vlkit.training.recompute import checkpoint_blocks

pytestmark = pytest.mark.slow  # PEFT imports transformers

EVERYWHERE = LoraOptions(parts=("vision", "projector", "llm"), rank=3, alpha=5.0)
FAMILIES = [
    "kimi-vl-tiny", "qwen2-vl-tiny", "qwen2.5-vl-tiny", "qwen3-vl-tiny", "qwen3-vl-moe-tiny", "qwen-vl-tiny", "andesvl-tiny",
    "andesvl-siglip2-tiny",
]  # fmt: skip


def make(name: str = "kimi-vl-tiny", dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model(name, dtype=dtype).eval()


def trained(model: VisionLanguageModel, seed: int = 1) -> VisionLanguageModel:
    """Adapters as training might leave them: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: VisionLanguageModel) -> torch.Tensor:
    return model(random_batch(model)).logits.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_adds_merges_saves_and_loads(name: str, tmp_path: Path) -> None:
    model, before = make(name), logits(make(name))
    names = add_lora(model, EVERYWHERE)
    assert {n.split(".")[0] for n in names} == {"vision", "projector", "llm"}
    assert torch.equal(logits(model), before)  # B is 0
    after = logits(trained(model))
    assert (after - before).abs().max() > 1e-3
    with without_lora(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)

    save_adapter(model, tmp_path / "adapter", base="owner/name")
    again = make(name)
    assert load_adapter(again, tmp_path / "adapter") == names
    assert (logits(again) - after).abs().max() < 2e-6  # fused layers add zeros in another order
    save_adapter(again, tmp_path / "again")  # parts with one A stay one adapter of that rank
    sizes = [(tmp_path / folder / "adapter_model.safetensors").stat().st_size for folder in ("adapter", "again")]
    assert sizes[0] == sizes[1]

    merge_lora(model)
    assert not has_lora(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in make(name).named_parameters()]
    assert (logits(model) - after).abs().max() < 2e-6
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(vlkit.from_pretrained(tmp_path / "merged")), logits(model))
    remove_lora(again)
    assert torch.equal(logits(again), before)


def test_targets_that_people_know_find_their_layers() -> None:
    def adapted(name: str, *targets: str, **options: Any) -> set[str]:
        found = add_lora(make(name), LoraOptions(targets=targets, rank=1, **options))
        return {".".join(n.split(".")[-2:]) for n in found}

    assert adapted("qwen2-vl-tiny", "q_proj", "v_proj") == {"attn.q", "attn.v"}
    assert adapted("qwen2-vl-tiny", "gate_proj", "up_proj", "down_proj") == {"mlp.gate", "mlp.up", "mlp.down"}
    assert adapted("qwen2-vl-tiny", "attn.qkv", parts=("vision",)) == {"attn.q", "attn.k", "attn.v"}
    assert adapted("qwen2-vl-tiny", "q_proj", parts=("vision",)) == {"attn.q"}  # fused there, but people know the name
    assert adapted("qwen2-vl-tiny", "merger.mlp.0", parts=("projector",)) == {"mlp.fc1"}
    assert adapted("kimi-vl-tiny", "kv_b_proj") == {"attn.kv_up"}
    assert adapted("qwen-vl-tiny", "c_attn", "attn.c_proj") == {"attn.q", "attn.k", "attn.v", "attn.out"}
    one = add_lora(make("qwen2-vl-tiny"), LoraOptions(targets=("blocks.1.attn.out",), rank=1))
    assert one == ["llm.blocks.1.attn.out"]


def test_only_adapters_train_in_adapted_parts_and_others_stay() -> None:
    model = make()
    model.vision.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, LoraOptions(targets=("q_proj",), rank=2))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if name.startswith("llm.")} == {
        f"llm.blocks.{layer}.attn.q.lora_{kind}.default.weight" for layer in range(2) for kind in "AB"
    }
    assert {name.split(".")[0] for name in learning} == {"projector", "llm"}
    groups = muon_param_groups(model, lr={"llm": 0.1})
    optimizer = Muon(groups, lr=0.2)
    assert {name for name in groups.report.names("muon") if "llm" in name} == {n for n in learning if "llm" in n}
    for _ in range(2):  # the gradient of A is 0 as long as B is
        loss = model.train()(random_batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        changed = name not in before or not torch.equal(parameter, before[name.replace(".base_layer.", ".")])
        if ".base_layer." in name:
            changed = not torch.equal(parameter, before[name.replace(".base_layer.", ".")])
        assert changed == parameter.requires_grad, name
    assert len([p for p in optimizer.state if p.requires_grad]) == len(learning)


@pytest.mark.parametrize("every", [1, "selective"])
def test_recomputed_blocks_give_adapters_the_same_gradients(every: Any) -> None:
    found = []
    for again in (False, True):
        model = make()
        add_lora(model, LoraOptions(parts=("vision", "llm"), rank=2))
        trained(model)
        if again:
            checkpoint_blocks(model, every=every)
        model.train()(random_batch(model)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in found[0].items() if is_adapter(name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def three_steps(model: VisionLanguageModel, batches: Any, share: float, **over_ranks: Any) -> dict[str, torch.Tensor]:
    optimizer = Muon(muon_param_groups(model), lr=1e-3, ns_dtype=torch.float64, **over_ranks)
    for step in range(3):
        batch = batches(step)
        out = model.train()(batch)
        (out.loss * out.num_targets / share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def on_a_rank(rank: int) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    model = make(dtype=torch.float64)
    add_lora(model, LoraOptions(rank=2))
    targets = num_targets(shares(model, 2, 0)), num_targets(shares(model, 2, 1)), num_targets(shares(model, 2, 2))
    assert len(set(targets)) == 1
    group = {"process_group": dist.group.WORLD, "grad_sync": "reduce_scatter"}
    return three_steps(model, lambda step: shares(model, 2, step)[rank], targets[0] / 2, **group)


def test_ranks_train_the_same_adapters() -> None:
    model = make(dtype=torch.float64)
    add_lora(model, LoraOptions(rank=2))
    whole = three_steps(model, lambda step: Batch.concat(shares(model, 2, step)), num_targets(shares(model, 2, 0)))
    for found in run_ranks(on_a_rank, 2):
        assert max(float((found[name] - whole[name]).abs().max()) for name in whole) < 1e-12


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path: Path) -> None:
    model = make()
    add_lora(model, LoraOptions(rank=1))
    with pytest.raises(ConfigError, match=r"adapters: merge_lora.*or write them alone with save_adapter"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model, LoraOptions(rank=1))
    assert not (tmp_path / "model").exists()


def test_different_ranks_and_strengths_survive_a_file(tmp_path: Path) -> None:
    """The tower's fused q, k and v with adapters on two of them, and rslora."""
    model = make("qwen2-vl-tiny")
    add_lora(model, LoraOptions(targets=("q_proj", "v_proj"), parts=("vision", "llm"), rank=4, alpha=3, rslora=True))
    after = logits(trained(model))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 6  # 3 / sqrt(4) * 4, without rslora
    assert config["rank_pattern"] == {f"model.visual.blocks.{n}.attn.qkv": 8 for n in range(2)}
    assert config["alpha_pattern"] == {f"model.visual.blocks.{n}.attn.qkv": 12 for n in range(2)}
    again = make("qwen2-vl-tiny")
    names = load_adapter(again, tmp_path)
    assert len([n for n in names if n.startswith("vision")]) == 6  # k has an adapter of zeros
    assert (logits(again) - after).abs().max() < 2e-6


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make("qwen2-vl-tiny")
    add_lora(model, LoraOptions(targets=("q_proj",), rank=2))
    save_adapter(model, tmp_path)
    with pytest.raises(KeyMismatchError, match="do not fit the model"):
        load_adapter(make("kimi-vl-tiny"), tmp_path)
    other = vlkit.create_model("qwen2-vl-tiny", llm=make("qwen2-vl-tiny").config.llm.replace(num_layers=1))  # type: ignore[attr-defined]
    with pytest.raises(KeyMismatchError, match="no such layer"):
        load_adapter(other, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=message):
            load_adapter(make("qwen2-vl-tiny"), tmp_path)
    path.write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(CheckpointError, match=r"rank 2, but adapter_config\.json says 3"):
        load_adapter(make("qwen2-vl-tiny"), tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(make("qwen2-vl-tiny"), tmp_path)


def test_adapters_take_the_dtype_of_their_layers() -> None:
    model = make(dtype=torch.bfloat16)
    add_lora(model, EVERYWHERE)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(isinstance(layer.base_layer, nn.Linear) for _, layer in lora_layers(model))


def test_answers_are_those_of_the_merged_model() -> None:
    """Also where latent attention reads its cache: the layer with the adapter is more than a matrix there."""
    model = make(dtype=torch.float64)
    add_lora(model, LoraOptions(parts=("vision", "llm"), rank=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                nn.init.normal_(parameter, std=0.3)
    batch = random_batch(model)
    answers = model.generate(batch, max_new_tokens=9, temperature=1.0, seed=3)
    merge_lora(model)
    assert model.generate(batch, max_new_tokens=9, temperature=1.0, seed=3) == answers
