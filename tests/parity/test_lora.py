"""Adapters against transformers and PEFT on the same checkpoint, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlkit
from tests.parity.test_qwen_vl import ROWS, inputs, reference
from vlkit.training.lora import LoraOptions, add_lora, is_adapter
from vlkit.training.lora_files import load_adapter, save_adapter

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # PEFT with transformers 5
]

CLOSE = (
    1e-4  # in fp64 transformers keeps angles in fp32: largest seen 9.5e-6, where adapters change logits by 8 and more
)


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def both(ours: Any, theirs: Any, family: str) -> tuple[Tensor, Tensor]:
    """Logits of the real tokens."""
    made = inputs(family, ROWS[:2])
    mask = made["attention_mask"].bool()
    out = theirs(**made).logits[mask]
    return ours(ours.pack(**made)).logits.tokens, out


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl"])
def test_adapters_mean_the_same_to_both(family: str, tmp_path: Path) -> None:
    base = reference(family, dtype=torch.float64)
    base.save_pretrained(tmp_path / "base")
    plain, _ = both(vlkit.from_pretrained(tmp_path / "base"), base, family)

    # Ours, read by PEFT. Every layer of every part; the tower's fused q, k, v with adapters on two of the three.
    for name, options in {
        "ours": LoraOptions(targets=("all-linear",), parts=("projector", "llm"), rank=3, alpha=7.0),
        "tower": LoraOptions(targets=("q_proj", "v_proj", "attn.out"), parts=("vision",), rank=2, rslora=True),
    }.items():
        ours = vlkit.from_pretrained(tmp_path / "base")
        add_lora(ours, options)
        randomise(ours)
        save_adapter(ours, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(reference(family, dtype=torch.float64), tmp_path / name).eval()
        one, two = both(ours, theirs, family)
        assert (one - plain).abs().max() > 0.5
        assert (one - two).abs().max() < CLOSE


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl"])
def test_what_peft_saved_means_the_same_here(family: str, tmp_path: Path) -> None:
    base = reference(family, dtype=torch.float64)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj", "qkv", "linear_fc1", "mlp.0"],
        rank_pattern={"q_proj": 2}, alpha_pattern={"qkv": 5, "layers.1.mlp.down_proj": 1},
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = vlkit.from_pretrained(tmp_path / "base")
    plain = both(ours, base, family)[0]
    names = load_adapter(ours, tmp_path / "theirs")
    assert {name.split(".")[0] for name in names} == {"vision", "projector", "llm"}
    one, two = both(ours, theirs, family)
    assert (one - plain).abs().max() > 0.5
    assert (one - two).abs().max() < CLOSE
