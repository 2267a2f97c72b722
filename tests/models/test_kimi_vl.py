"""Kimi-VL as a whole: published names, shapes and counts, the config both ways, and golden numbers of a hand-filled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlkit
from vlkit.errors import ConfigError, KeyMismatchError
from vlkit.llm.moonlight import MoonlightConfig
from vlkit.models import VLMConfig, kimi_vl
from vlkit.packing import Batch, Layout, Packed
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig
from vlkit.vision.moonvit import MoonViTConfig

PUBLISHED: dict[str, Any] = {
    "model_type": "kimi_vl",
    "architectures": ["KimiVLForConditionalGeneration"],
    "media_placeholder_token_id": 163605,
    "ignore_index": -100,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "vision_config": {
        "model_type": "moonvit", "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 27, "hidden_size": 1152,
        "intermediate_size": 4304, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "torch_dtype": "bfloat16",
    },
    "text_config": {
        "model_type": "deepseek_v3", "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 11264,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "n_shared_experts": 2, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.446, "hidden_act": "silu",
        "rope_theta": 800000.0, "rope_scaling": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "aux_loss_alpha": 0.001, "seq_aux": True, "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def published_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The key table of the published checkpoint, written out from the sizes alone."""
    v, t = config["vision_config"], config["text_config"]
    dim, mlp, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (dim, 3, patch, patch),
        "vision_tower.patch_embed.proj.bias": (dim,),
        "vision_tower.patch_embed.pos_emb.weight": (v["init_pos_emb_height"], v["init_pos_emb_width"], dim),
        "vision_tower.encoder.final_layernorm.weight": (dim,),
        "vision_tower.encoder.final_layernorm.bias": (dim,),
    }

    def linear(name: str, out: int, in_: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, in_)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    for n in range(v["num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{n}"
        for norm in ("norm0", "norm1"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (dim,)
        linear(f"{block}.wqkv", 3 * dim, dim)
        linear(f"{block}.wo", dim, dim)
        linear(f"{block}.mlp.fc0", mlp, dim)
        linear(f"{block}.mlp.fc1", dim, mlp)
    width, merged = t["hidden_size"], 4 * dim
    shapes["multi_modal_projector.pre_norm.weight"] = shapes["multi_modal_projector.pre_norm.bias"] = (dim,)
    linear("multi_modal_projector.linear_1", merged, merged)
    linear("multi_modal_projector.linear_2", width, merged)
    model, heads = "language_model.model", t["num_attention_heads"]
    nope, rope, value, rank = (t[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    shapes[f"{model}.embed_tokens.weight"] = shapes["language_model.lm_head.weight"] = (t["vocab_size"], width)
    shapes[f"{model}.norm.weight"] = (width,)
    for n in range(t["num_hidden_layers"]):
        layer = f"{model}.layers.{n}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{layer}.self_attn.kv_a_layernorm.weight"] = (rank,)
        linear(f"{layer}.self_attn.q_proj", heads * (nope + rope), width, bias=False)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", rank + rope, width, bias=False)
        linear(f"{layer}.self_attn.kv_b_proj", heads * (nope + value), rank, bias=False)
        linear(f"{layer}.self_attn.o_proj", width, heads * value, bias=False)
        mlps = {"": t["intermediate_size"]}
        if n >= t["first_k_dense_replace"]:
            experts, wide = t["n_routed_experts"], t["moe_intermediate_size"]
            shapes[f"{layer}.mlp.gate.weight"] = (experts, width)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
            mlps = {f"experts.{e}.": wide for e in range(experts)} | {"shared_experts.": t["n_shared_experts"] * wide}
        for mlp_name, hidden in mlps.items():
            linear(f"{layer}.mlp.{mlp_name}gate_proj", hidden, width, bias=False)
            linear(f"{layer}.mlp.{mlp_name}up_proj", hidden, width, bias=False)
            linear(f"{layer}.mlp.{mlp_name}down_proj", width, hidden, bias=False)
    return shapes


def test_published_names_and_shapes_both_ways() -> None:
    """All 5,652 tensors of the checkpoint have a place, and saving gives exactly those names and shapes; on meta."""
    config = kimi_vl.read_config(PUBLISHED)
    want = published_shapes(PUBLISHED)
    assert len(want) == 5652
    model = vlkit.create_model(config, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = kimi_vl.keys(config)
    loaded = keys.plan_load(want, ours)
    assert {step.target for step in loaded} == set(ours)
    assert {step.target: tuple(step.shape) for step in keys.plan_save(ours)} == want


def test_stale_rotary_buffers_are_dropped_and_nothing_else() -> None:
    config = kimi_vl.read_config(PUBLISHED)
    ours = {name: tuple(t.shape) for name, t in vlkit.create_model(config, device="meta").state_dict().items()}
    theirs = published_shapes(PUBLISHED)
    stale = {f"language_model.model.layers.{n}.self_attn.rotary_emb.inv_freq": (32,) for n in range(27)}
    assert len(kimi_vl.keys(config).plan_load({**theirs, **stale}, ours)) == len(ours)
    with pytest.raises(KeyMismatchError, match="q_norm"):
        kimi_vl.keys(config).plan_load(
            {**theirs, "language_model.model.layers.0.self_attn.q_norm.weight": (192,)}, ours
        )


def test_published_parameter_counts() -> None:
    """The published figures: 16.4 B in all, 2.24 B active without embeddings; the router's 26 x 64 biases are buffers here."""
    model = vlkit.create_model("kimi-vl-a3b", device="meta")
    biases = 26 * 64
    assert sum(p.numel() for p in model.vision.parameters()) == 416_866_032
    assert sum(p.numel() for p in model.projector.parameters()) == 30_679_808
    assert sum(p.numel() for p in model.llm.parameters()) + biases == 15_960_110_208
    assert model.num_parameters() + biases == 16_407_656_048
    embeddings = 2 * 335_544_320
    visual = 416_866_032 + 30_679_808
    assert model.num_parameters(active=True) - visual - embeddings + biases == 2_243_687_552


def test_config_both_ways() -> None:
    config = kimi_vl.read_config(PUBLISHED)
    assert config == vlkit.create_model("kimi-vl-a3b", device="meta").config
    written = kimi_vl.write_config(config)
    for part in ("vision_config", "text_config"):
        for name, value in written[part].items():
            assert PUBLISHED[part][name] == value, f"{part}.{name}"
    assert kimi_vl.read_config(written) == config


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling"),
        ("text_config", "q_lora_rank", 1536, "q_lora_rank"),
        ("text_config", "attention_bias", True, "attention_bias"),
        ("text_config", "scoring_func", "softmax", "'softmax' is not supported, only 'sigmoid'"),
        ("text_config", "hidden_size", 2048.0, "expected int"),
        ("text_config", "n_routed_experts", -1, "-1"),
        ("vision_config", "merge_kernel_size", [2, 1], "not square"),
    ],
)
def test_unsupported_values_are_refused(part: str, field: str, value: Any, words: str) -> None:
    hub = {**PUBLISHED, part: {**PUBLISHED[part], field: value}}
    with pytest.raises(ConfigError, match=words):
        kimi_vl.read_config(hub)


def test_missing_fields_are_never_filled_from_class_defaults() -> None:
    text = {k: v for k, v in PUBLISHED["text_config"].items() if k != "rope_theta"}
    with pytest.raises(ConfigError, match="missing 'rope_theta'"):
        kimi_vl.read_config({**PUBLISHED, "text_config": text})


def test_unknown_fields_are_named_once() -> None:
    with pytest.warns(UserWarning, match="text_config: fields without an effect in vlkit: sliding_window"):
        kimi_vl.read_config({**PUBLISHED, "text_config": {**PUBLISHED["text_config"], "sliding_window": 4096}})


def test_a_swapped_part_leaves_the_family() -> None:
    model = vlkit.create_model("kimi-vl-tiny", llm="qwen3-tiny")
    assert model.config.family is None
    with pytest.raises(ConfigError, match="vlkit's own"):
        kimi_vl.write_config(model.config.replace(family="kimi-vl"))


GOLDEN = VLMConfig(
    vision=MoonViTConfig(dim=16, num_layers=2, num_heads=2, mlp_dim=24, patch_size=14, position_grid=(4, 4)),
    projector=PixelShuffleConfig(in_dim=16, out_dim=12),
    llm=MoonlightConfig(
        vocab_size=20, dim=12, num_layers=2, num_heads=2, nope_dim=4, rope_dim=4, value_dim=4, kv_rank=6, mlp_dim=20,
        num_dense_layers=1, num_experts=4, expert_dim=8, top_k=2, num_shared_experts=1, theta=800000.0, norm_eps=1e-5,
        routed_scale=2.446,
    ),
    image_token_id=19,
    family="kimi-vl",
)  # fmt: skip


def golden_names() -> list[str]:
    """The published names of the golden model in the order in which its tensors are filled."""
    names = [f"vision_tower.patch_embed.{n}" for n in ("proj.weight", "proj.bias", "pos_emb.weight")]
    for i in range(2):
        for part in ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1"):
            names += [f"vision_tower.encoder.blocks.{i}.{part}.{kind}" for kind in ("weight", "bias")]
    names += [f"vision_tower.encoder.final_layernorm.{kind}" for kind in ("weight", "bias")]
    for part in ("pre_norm", "linear_1", "linear_2"):
        names += [f"multi_modal_projector.{part}.{kind}" for kind in ("weight", "bias")]
    names.append("language_model.model.embed_tokens.weight")
    mlp = ["gate_proj", "up_proj", "down_proj"]
    for i in range(2):
        layer = f"language_model.model.layers.{i}"
        names.append(f"{layer}.input_layernorm.weight")
        attention = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        names += [f"{layer}.self_attn.{n}.weight" for n in attention]
        names.append(f"{layer}.post_attention_layernorm.weight")
        if i == 0:
            names += [f"{layer}.mlp.{n}.weight" for n in mlp]
        else:
            names += [f"{layer}.mlp.gate.weight", f"{layer}.mlp.gate.e_score_correction_bias"]
            names += [f"{layer}.mlp.experts.{e}.{n}.weight" for e in range(4) for n in mlp]
            names += [f"{layer}.mlp.shared_experts.{n}.weight" for n in mlp]
    return [*names, "language_model.model.norm.weight", "language_model.lm_head.weight"]


def golden_state() -> dict[str, torch.Tensor]:
    hub = kimi_vl.write_config(GOLDEN)
    shapes = published_shapes(hub)
    names = golden_names()
    assert len(names) == 72
    assert set(names) == set(shapes)
    state = {}
    for n, name in enumerate(names):
        count = torch.Size(shapes[name]).numel()
        value = 0.3 * torch.sin(1.7 * torch.arange(count, dtype=torch.float64) + n)
        if "norm" in name and name.endswith("weight"):
            value = value + 1
        state[name] = value.view(shapes[name])
    return state


def test_golden_numbers() -> None:
    """Three packed images and a text through a model filled by a formula, in float64: every stage, figure by figure.

    The figures were made by two implementations that share no code with this one; a wrong rope order, epsilon, GELU, gate
    or scale moves them by 6e-6 (kv_norm epsilon) to above 1.
    """
    model = vlkit.models.VisionLanguageModel(GOLDEN).double()
    keys = kimi_vl.keys(GOLDEN)
    model.load_state_dict(keys.to_ours(golden_state()))
    layout = Layout.from_grids([(2, 4), (4, 4), (6, 2)])
    pixels = torch.sin(0.31 * torch.arange(36 * 588, dtype=torch.float64)).view(36, 588)
    ids = torch.tensor([1, 7, 3, 19, 19, 4, 5, 19, 19, 19, 19, 6, 19, 19, 19, 2, 9, 8])

    def near(tensor: torch.Tensor, text: str, tolerance: float = 2e-6) -> None:
        want = torch.tensor([float(x) for x in text.split()], dtype=torch.float64)
        assert float((tensor - want).abs().max()) <= tolerance, f"{tensor.tolist()} against {text}"

    with torch.no_grad():
        tower = model.vision(Packed(pixels, layout))
        merged = torch.cat([
            image.view(h // 2, 2, w // 2, 2, 16).transpose(1, 2).reshape(-1, 4, 16)
            for image, (_, h, w) in zip(tower.unpack(), layout.grids or (), strict=True)
        ])  # [9, 4, 16], sub-patches in (row, column) order  # fmt: skip
        near(merged.sum(), "32.293534", 1e-5)
        near(merged.abs().sum(), "526.534714", 1e-5)
        near(merged[0, 0, :6], "-0.534277 -0.331438 0.625001 -1.091695 1.092914 -0.202474")
        near(merged[3, 2, :6], "0.053450 -0.508724 0.548048 -1.073546 1.465167 -0.485256")
        near(merged[8, 3, -6:], "0.865126 0.883280 -0.561338 -0.642224 2.163298 -1.412103")
        images = model.projector(tower).tokens
        near(images.sum(), "-6.329180", 1e-5)
        near(images[0, :6], "1.291667 -1.858519 0.057423 1.763695 -1.317537 -0.694431")
        near(images[8, :6], "0.976807 -1.813242 0.335768 1.493939 -1.378331 -0.375646")
        out = model(Batch(Packed(ids, Layout((18,))), Packed(pixels, layout)))
    logits = out.logits.tokens
    near(logits.sum(), "3.356483", 1e-5)
    near(logits.abs().sum(), "251.001253", 1e-5)
    near(logits[17, :8], "-0.296875 0.377401 0.312236 -0.364692 -0.327080 0.351379 0.341381 -0.337485")
    assert logits.argmax(1).tolist() == [2, 12, 0, 1, 1, 18, 2, 1, 1, 1, 1, 16, 1, 1, 1, 16, 2, 18]
    (routing,) = out.routing
    chosen = ["".join(map(str, sorted(row))) for row in routing.experts.tolist()]
    assert chosen == [
        "12",
        "23",
        "23",
        "01",
        "12",
        "01",
        "23",
        "02",
        "02",
        "12",
        "01",
        "23",
        "01",
        "01",
        "02",
        "23",
        "12",
        "23",
    ]
