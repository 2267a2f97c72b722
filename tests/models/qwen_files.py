"""What the published files of Qwen2-VL, Qwen2.5-VL and Qwen3-VL say: config.json, and the name and shape of every tensor.

Written out from the sizes alone, so that the code under test has no part in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Shapes = dict[str, tuple[int, ...]]


class Size(NamedTuple):
    """Sizes of one published decoder, and the totals of its checkpoint.

    Attributes:
        tower: Hidden width of the tower's MLP (Qwen2.5-VL), or "small" / "large" (Qwen3-VL).
        experts: Experts, chosen ones, and the hidden width of one; or nothing.
        parameters: Tied ones once.
        keys: Names in the file, with lm_head.weight even where it is left out because it is tied.
    """

    family: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    parameters: int
    keys: int
    tower: int | str = 0
    experts: tuple[int, int, int] | None = None


SIZES: dict[str, Size] = {
    "qwen2-vl-2b": Size("qwen2-vl", 1536, 28, 12, 2, 8960, 151936, True, 2_208_985_600, 730),
    "qwen2-vl-7b": Size("qwen2-vl", 3584, 28, 28, 4, 18944, 152064, False, 8_291_375_616, 730),
    "qwen2-vl-72b": Size("qwen2-vl", 8192, 80, 64, 8, 29568, 152064, False, 73_405_560_320, 1354),
    "qwen2.5-vl-3b": Size("qwen2.5-vl", 2048, 36, 16, 2, 11008, 151936, True, 3_754_622_976, 825, 3420),
    "qwen2.5-vl-7b": Size("qwen2.5-vl", 3584, 28, 28, 4, 18944, 152064, False, 8_292_166_656, 729, 3420),
    "qwen2.5-vl-32b": Size("qwen2.5-vl", 5120, 64, 40, 8, 27648, 152064, False, 33_452_718_336, 1161, 3456),
    "qwen2.5-vl-72b": Size("qwen2.5-vl", 8192, 80, 64, 8, 29568, 152064, False, 73_410_777_344, 1353, 3456),
    "qwen3-vl-2b": Size("qwen3-vl", 2048, 28, 16, 8, 6144, 151936, True, 2_127_532_032, 626, "small"),
    "qwen3-vl-4b": Size("qwen3-vl", 2560, 36, 32, 8, 9728, 151936, True, 4_437_815_808, 714, "small"),
    "qwen3-vl-8b": Size("qwen3-vl", 4096, 36, 32, 8, 12288, 151936, False, 8_767_123_696, 750, "large"),
    "qwen3-vl-32b": Size("qwen3-vl", 5120, 64, 64, 8, 25600, 151936, False, 33_357_390_064, 1058, "large"),
    "qwen3-vl-30b-a3b": Size(
        "qwen3-vl-moe", 2048, 48, 32, 4, 6144, 151936, False, 31_070_754_032, 882, "large", (128, 8, 768)
    ),
    "qwen3-vl-235b-a22b": Size(
        "qwen3-vl-moe", 4096, 94, 64, 4, 12288, 151936, False, 235_670_022_896, 1388, "large", (128, 8, 1536)
    ),
}
FLAT = ("qwen2-vl", "qwen2.5-vl")
MODEL_TYPES = {
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "qwen3-vl-moe": "qwen3_vl_moe",
}
CLASSES = {
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "qwen3-vl-moe": "Qwen3VLMoeForConditionalGeneration",
}
IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def published_config(name: str) -> dict[str, Any]:
    """config.json as the vendor published it."""
    size = SIZES[name]
    model_type = MODEL_TYPES[size.family]
    text = {
        "hidden_size": size.dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.mlp,
        "vocab_size": size.vocab,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    common = {
        "model_type": model_type,
        "architectures": [CLASSES[size.family]],
        "tie_word_embeddings": size.tied,
        **IDS,
    }
    if size.family in FLAT:
        flat = {
            "max_position_embeddings": 32768 if size.family == "qwen2-vl" else 128000,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": size.layers,
            "vision_token_id": 151654,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.41.2",
        }
        return {**common, **text, **flat, "vision_config": vision_config(size)}
    nested = {
        "model_type": f"{model_type}_text",
        "head_dim": 128,
        "attention_bias": False,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "dtype": "bfloat16",
    }
    if size.experts is not None:
        num, top, wide = size.experts
        nested |= {
            "num_experts": num,
            "num_experts_per_tok": top,
            "moe_intermediate_size": wide,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    else:
        nested["tie_word_embeddings"] = size.tied
    return {
        **common,
        "text_config": {**text, **nested},
        "vision_config": vision_config(size),
        "transformers_version": "4.57.0.dev0",
    }


def vision_config(size: Size) -> dict[str, Any]:
    """The part of config.json about the tower."""
    if size.family == "qwen2-vl":
        return {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": size.dim,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        }  # fmt: skip
    if size.family == "qwen2.5-vl":
        return {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": size.tower, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": size.dim, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2,
        }  # fmt: skip
    small = size.tower == "small"
    return {
        "model_type": MODEL_TYPES[size.family],
        "depth": 24 if small else 27,
        "hidden_size": 1024 if small else 1152,
        "intermediate_size": 4096 if small else 4304,
        "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": size.dim,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def published_shapes(name: str, *, layout: str = "published") -> Shapes:
    """Name and shape of every tensor of a checkpoint.

    Args:
        layout: "published"; or "transformers", which has the newer prefixes, and experts as [experts, out, in].
    """
    size = SIZES[name]
    flat = size.family in FLAT and layout == "published"
    shapes: Shapes = {}
    for key, shape in _tower_shapes(size).items():
        shapes[("visual." if flat else "model.visual.") + key] = shape
    for key, shape in _decoder_shapes(size, transposed=layout == "published").items():
        shapes[("model." if flat else "model.language_model.") + key] = shape
    if not size.tied:
        shapes["lm_head.weight"] = (size.vocab, size.dim)
    return shapes


def _linear(shapes: Shapes, name: str, out: int, in_: int, *, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (out, in_)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def _norm(shapes: Shapes, name: str, dim: int, *, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (dim,)
    if bias:
        shapes[f"{name}.bias"] = (dim,)


def _tower_shapes(size: Size) -> Shapes:
    shapes: Shapes = {}
    third, window = size.family.startswith("qwen3"), size.family == "qwen2.5-vl"
    small = size.tower == "small"
    depth, dim, mlp = (24, 1024, 4096) if small else (27, 1152, 4304) if third else (32, 1280, size.tower or 5120)
    assert isinstance(mlp, int)
    patch = 16 if third else 14
    shapes["patch_embed.proj.weight"] = (dim, 3, 2, patch, patch)
    if third:
        shapes["patch_embed.proj.bias"] = (dim,)
        shapes["pos_embed.weight"] = (2304, dim)
    for n in range(depth):
        block = f"blocks.{n}"
        _norm(shapes, f"{block}.norm1", dim, bias=not window)
        _norm(shapes, f"{block}.norm2", dim, bias=not window)
        _linear(shapes, f"{block}.attn.qkv", 3 * dim, dim)
        _linear(shapes, f"{block}.attn.proj", dim, dim)
        if window:
            _linear(shapes, f"{block}.mlp.gate_proj", mlp, dim)
            _linear(shapes, f"{block}.mlp.up_proj", mlp, dim)
            _linear(shapes, f"{block}.mlp.down_proj", dim, mlp)
        else:
            _linear(shapes, f"{block}.mlp.{'linear_fc1' if third else 'fc1'}", mlp, dim)
            _linear(shapes, f"{block}.mlp.{'linear_fc2' if third else 'fc2'}", dim, mlp)
    if third:
        for merger in ("merger", *(f"deepstack_merger_list.{k}" for k in range(3))):
            _norm(shapes, f"{merger}.norm", dim if merger == "merger" else 4 * dim)
            _linear(shapes, f"{merger}.linear_fc1", 4 * dim, 4 * dim)
            _linear(shapes, f"{merger}.linear_fc2", size.dim, 4 * dim)
    else:
        _norm(shapes, "merger.ln_q", dim, bias=not window)
        _linear(shapes, "merger.mlp.0", 4 * dim, 4 * dim)
        _linear(shapes, "merger.mlp.2", size.dim, 4 * dim)
    return shapes


def _decoder_shapes(size: Size, *, transposed: bool) -> Shapes:
    shapes: Shapes = {"embed_tokens.weight": (size.vocab, size.dim), "norm.weight": (size.dim,)}
    third, head = size.family.startswith("qwen3"), 128
    for n in range(size.layers):
        layer = f"layers.{n}"
        _norm(shapes, f"{layer}.input_layernorm", size.dim, bias=False)
        _norm(shapes, f"{layer}.post_attention_layernorm", size.dim, bias=False)
        _linear(shapes, f"{layer}.self_attn.q_proj", size.heads * head, size.dim, bias=not third)
        _linear(shapes, f"{layer}.self_attn.k_proj", size.kv_heads * head, size.dim, bias=not third)
        _linear(shapes, f"{layer}.self_attn.v_proj", size.kv_heads * head, size.dim, bias=not third)
        _linear(shapes, f"{layer}.self_attn.o_proj", size.dim, size.heads * head, bias=False)
        if third:
            _norm(shapes, f"{layer}.self_attn.q_norm", head, bias=False)
            _norm(shapes, f"{layer}.self_attn.k_norm", head, bias=False)
        if size.experts is None:
            _linear(shapes, f"{layer}.mlp.gate_proj", size.mlp, size.dim, bias=False)
            _linear(shapes, f"{layer}.mlp.up_proj", size.mlp, size.dim, bias=False)
            _linear(shapes, f"{layer}.mlp.down_proj", size.dim, size.mlp, bias=False)
        else:
            num, _, wide = size.experts
            shapes[f"{layer}.mlp.gate.weight"] = (num, size.dim)
            gate_up, down = (num, 2 * wide, size.dim), (num, size.dim, wide)
            if transposed:
                gate_up, down = (num, size.dim, 2 * wide), (num, wide, size.dim)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = gate_up
            shapes[f"{layer}.mlp.experts.down_proj"] = down
    return shapes
