"""Options of adapters, without PEFT."""

from __future__ import annotations

import sys

import pytest

import vlkit
from vlkit.errors import ConfigError, MissingDependencyError
from vlkit.training.lora import LoraOptions, add_lora, has_lora, published_layers
from vlkit.training.lora_files import save_adapter


def test_options_are_checked() -> None:
    assert LoraOptions(rank=16, alpha=32).scale == 2
    assert LoraOptions(rank=16, alpha=32, rslora=True).scale == 8
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"parts": ("tower",)}):
        with pytest.raises(ConfigError, match="LoraOptions"):
            LoraOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", r"'q_prj' names no linear layer of llm; there are .*q_proj.*and 'all-linear'"),
        ("lm_head", "llm.lm_head is the head, whose weight alone the loss reads"),
        ("roj", "names no linear layer"),  # whole words only
    ],
)
def test_targets_without_a_layer_are_refused(target: str, message: str) -> None:
    model = vlkit.create_model("kimi-vl-tiny", device="meta")
    with pytest.raises(ConfigError, match=message):
        add_lora(model, LoraOptions(targets=(target,)))
    assert not has_lora(model)


def test_stacked_experts_are_refused_by_name() -> None:
    model = vlkit.create_model("qwen3-vl-moe-tiny", device="meta")  # all of its MLPs are experts
    for target in ("up_proj", "experts"):
        with pytest.raises(
            ConfigError, match=r"fits only the stacked experts \(llm.blocks.0.*\), whose adapters are not"
        ):
            add_lora(model, LoraOptions(targets=(target,)))


def test_layers_that_the_hub_holds_otherwise_are_refused() -> None:
    model = vlkit.create_model("qwen-vl-tiny", device="meta")
    for target, message in (("patch_embed.proj", "in another shape or order"), ("attn.q", "no layer of its own")):
        part = "vision" if "patch" in target else "projector"
        with pytest.raises(ConfigError, match=message):
            add_lora(model, LoraOptions(targets=(target,), parts=(part,)))  # type: ignore[arg-type]


def test_layers_have_the_names_of_the_modules_of_the_family() -> None:
    names = {
        ours: theirs
        for ours, (theirs, _, _) in published_layers(vlkit.create_model("qwen2-vl-tiny", device="meta")).items()
    }
    assert names["llm.blocks.1.attn.out"] == "model.language_model.layers.1.self_attn.o_proj"
    fused = {names[f"vision.blocks.0.attn.{part}"] for part in "qkv"}
    assert fused == {"model.visual.blocks.0.attn.qkv"}
    kimi = {
        ours: theirs
        for ours, (theirs, _, _) in published_layers(vlkit.create_model("kimi-vl-tiny", device="meta")).items()
    }
    assert kimi["vision.blocks.0.attn.k"] == "vision_tower.encoder.blocks.0.wqkv"


def test_without_peft_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = vlkit.create_model("kimi-vl-tiny", device="meta")
    with pytest.raises(MissingDependencyError, match=r"pip install 'vlkit\[peft\]'"):
        add_lora(model, LoraOptions(targets=("q_proj",)))


def test_a_model_without_adapters_has_none_to_save() -> None:
    with pytest.raises(ConfigError, match=r"no adapters; model\.save_pretrained"):
        save_adapter(vlkit.create_model("kimi-vl-tiny", device="meta"), "nowhere")
