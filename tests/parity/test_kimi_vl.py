"""Kimi-VL as a whole against transformers' kimi_k25, which computes the same for still images: folder -> logits -> folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlkit

kimi = pytest.importorskip("transformers.models.kimi_k25")
transformers = pytest.importorskip("transformers")

IMAGE = 94
HEADS = 4  # of the tower
EXPERTS = 4
VISION: dict[str, Any] = {
    "patch_size": 6, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 56,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
    "intermediate_size": 52, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.446, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
HUB_CONFIG: dict[str, Any] = {
    "model_type": "kimi_vl",
    "architectures": ["KimiVLForConditionalGeneration"],
    "media_placeholder_token_id": IMAGE,
    "vision_config": {
        **VISION, "model_type": "moonvit", "init_pos_emb_height": 7, "init_pos_emb_width": 7, "merge_kernel_size": [2, 2],
    },
    "text_config": {
        **TEXT, "model_type": "deepseek_v3", "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "hidden_act": "silu", "attention_bias": False, "rope_theta": 50000.0, "rope_scaling": None, "eos_token_id": [90, 91],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    config = kimi.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(
            **TEXT, rope_theta=50000.0, rope_scaling=None, attention_bias=False, experts_implementation="eager"
        ),
        vision_config={
            **VISION,
            "pos_emb_height": 7,
            "pos_emb_width": 7,
            "merge_kernel_size": (2, 2),
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        projection_hidden_size=VISION["hidden_size"],
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    model = kimi.modeling_kimi_k25.Kimi_K25ForConditionalGeneration._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model


def paired(x: Tensor) -> Tensor:
    """Rows of q or k from rotate-half order to pairs of neighbours, which is how Kimi-VL publishes them."""
    return x.unflatten(0, (HEADS, 2, -1)).transpose(1, 2).flatten(0, 2)


def published(model: nn.Module) -> dict[str, Tensor]:
    """The reference's weights under the names of moonshotai/Kimi-VL-A3B-Instruct."""
    state: dict[str, Tensor] = {}
    theirs = model.state_dict()
    for name, tensor in theirs.items():
        if name.startswith("model.vision_tower."):
            if ".attn.k_proj." in name or ".attn.v_proj." in name:
                continue
            if ".attn.q_proj." in name:
                k, v = (theirs[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
                tensor = torch.cat([paired(tensor), paired(k), v])
            for old, new in (
                ("model.", ""), (".layers.", ".encoder.blocks."), (".norm1.", ".norm0."), (".norm2.", ".norm1."),
                ("attn.q_proj", "wqkv"), ("attn.proj", "wo"), ("mlp.fc1", "mlp.fc0"), ("mlp.fc2", "mlp.fc1"),
                ("pos_emb.position_embeddings", "pos_emb.weight"), ("final_layernorm", "encoder.final_layernorm"),
            ):  # fmt: skip
                name = name.replace(old, new, 1)
            state[name] = tensor
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.", "multi_modal_projector.")
            state[name.replace("in_proj", "linear_1").replace("out_proj", "linear_2")] = tensor
        else:
            name = name.replace("model.language_model.", "language_model.model.").replace(
                "lm_head", "language_model.lm_head"
            )
            if name.endswith("gate_up_proj"):
                for expert in range(EXPERTS):
                    gate, up = tensor[expert].chunk(2)
                    state[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                    state[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
            elif name.endswith("experts.down_proj"):
                for expert in range(EXPERTS):
                    state[name.replace("down_proj", f"{expert}.down_proj.weight")] = tensor[expert]
            else:
                state[name] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def folder(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi-vl")
    (folder / "config.json").write_text(json.dumps(HUB_CONFIG))
    save_file(published(reference), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(side: str) -> dict[str, Tensor]:
    """A row with two images of odd unequal grids, a row of text alone, a row with one image, padded on one side."""
    generator = torch.Generator().manual_seed(5)
    grids = [(2, 6), (10, 4), (4, 4)]
    rows = [[1, 2, *[IMAGE] * 3, 5, *[IMAGE] * 10, 7, 8], [9, 10, 11], [3, *[IMAGE] * 4, 4, 6]]
    length = max(map(len, rows)) + 1
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        ids[row, where], mask[row, where] = torch.tensor(tokens), 1
    patches = torch.randn(sum(h * w for h, w in grids), 3, 6, 6, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": patches, "image_grid_hws": torch.tensor(grids)}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_published_folder(reference: nn.Module, folder: Path, side: str) -> None:
    """fp32: relative error at most 2e-5 and KL at most 1e-6; 2e-6 and 1e-11 seen."""
    tensors = inputs(side)
    model = vlkit.from_pretrained(folder)
    ours = model(model.pack(**tensors)).logits.tokens
    grids = tensors.pop("image_grid_hws")
    thw = torch.cat([torch.ones(len(grids), 1, dtype=torch.long), grids], dim=1)
    mask = tensors["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = reference(**tensors, image_grid_thw=thw, position_ids=positions).logits[mask.bool()]
    relative = float((ours - theirs).abs().max() / theirs.abs().max())
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).max())
    print(f"logits {relative:.1e}, KL {divergence:.1e}")
    assert relative <= 2e-5
    assert divergence <= 1e-6


def test_saved_again_it_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    vlkit.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    for part, fields in HUB_CONFIG.items():
        if isinstance(fields, dict):
            assert {key: saved[part].get(key, "missing") for key in fields} == fields
        else:
            assert saved[part] == fields


@torch.no_grad()
def test_generation_equals_the_reference(reference: nn.Module, folder: Path) -> None:
    """Greedy answers of a batch of unequal rows with images, against the reference run token by token without a cache."""
    tensors = inputs("right")
    model = vlkit.from_pretrained(folder)
    answers = model.generate(model.pack(**tensors), max_new_tokens=5, stop=())
    taken = 0
    grids = tensors["image_grid_hws"]
    for row, images in enumerate([2, 0, 1]):
        keep = tensors["attention_mask"][row].bool()
        ids = tensors["input_ids"][row, keep].tolist()
        sizes = [int(h * w) for h, w in grids]
        first = sum(sizes[:taken])
        last = first + sum(sizes[taken : taken + images])
        own = {}
        if images:
            thw = torch.cat([torch.ones(images, 1, dtype=torch.long), grids[taken : taken + images]], dim=1)
            own = {"pixel_values": tensors["pixel_values"][first:last], "image_grid_thw": thw}
        taken += images
        for token in answers[row]:
            logits = reference(input_ids=torch.tensor([ids]), **own).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
