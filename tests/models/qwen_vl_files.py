"""Checkpoint folders of Qwen-VL's layout with odd sizes, conversations for them, and the published table of names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hub.files import write_folder_of

VISUAL = "transformer.visual."


def fixed_positions(side: int, dim: int) -> Tensor:
    """[side * side, dim], one number at a time."""
    table = torch.zeros(side * side, dim, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (i / (dim // 4))
                    table[row * side + column, half * dim // 2 + i] = math.sin(angle)
                    table[row * side + column, half * dim // 2 + dim // 4 + i] = math.cos(angle)
    return table


ODD: dict[str, Any] = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 331, "hidden_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 8, "kv_channels": 32, "intermediate_size": 182,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 300,
    "max_position_embeddings": 4096, "no_bias": True, "scale_attn_weights": True, "use_dynamic_ntk": True,
    "use_logn_attn": True, "tie_word_embeddings": False, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "fp32": False,
    "initializer_range": 0.02, "onnx_safe": None, "tokenizer_type": "QWenTokenizer", "use_cache": True, "bf16": True,
    "fp16": False, "use_flash_attn": "auto", "transformers_version": "4.31.0", "torch_dtype": "float32",
    "visual": {
        "heads": 5, "image_size": 448, "image_start_id": 311, "layers": 3, "mlp_ratio": 2.32, "output_dim": 256,
        "patch_size": 6, "width": 35,
    },
}  # fmt: skip


def published_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The key table of a published checkpoint, written out from its config alone."""
    dim, v = config["hidden_size"], config["visual"]
    width, wide, out = v["width"], int(v["width"] * v["mlp_ratio"]), v["output_dim"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], dim)}
    for n in range(config["num_hidden_layers"]):
        block = f"transformer.h.{n}"
        inner = config["intermediate_size"] // 2
        shapes |= {
            f"{block}.ln_1.weight": (dim,),
            f"{block}.attn.c_attn.weight": (3 * dim, dim),
            f"{block}.attn.c_attn.bias": (3 * dim,),
            f"{block}.attn.c_proj.weight": (dim, dim),
            f"{block}.ln_2.weight": (dim,),
            f"{block}.mlp.w1.weight": (inner, dim),
            f"{block}.mlp.w2.weight": (inner, dim),
            f"{block}.mlp.c_proj.weight": (dim, inner),
        }
    shapes |= {"transformer.ln_f.weight": (dim,), "lm_head.weight": (config["vocab_size"], dim)}

    def both(name: str, *weight: int) -> None:
        shapes[f"{VISUAL}{name}.weight"] = weight
        shapes[f"{VISUAL}{name}.bias"] = weight[:1]

    shapes[f"{VISUAL}conv1.weight"] = (width, 3, v["patch_size"], v["patch_size"])
    shapes[f"{VISUAL}positional_embedding"] = (256, width)
    both("ln_pre", width)
    for n in range(v["layers"]):
        block = f"transformer.resblocks.{n}"
        both(f"{block}.ln_1", width)
        both(f"{block}.ln_2", width)
        both(f"{block}.attn.in_proj", 3 * width, width)
        both(f"{block}.attn.out_proj", width, width)
        both(f"{block}.mlp.c_fc", wide, width)
        both(f"{block}.mlp.c_proj", width, wide)
    for name, shape in (("query", (256, out)), ("pos_embed", (256, out)), ("kv_proj.weight", (out, width))):
        shapes[f"{VISUAL}attn_pool.{name}"] = shape
    shapes[f"{VISUAL}attn_pool.attn.in_proj_weight"] = (3 * out, out)
    shapes[f"{VISUAL}attn_pool.attn.in_proj_bias"] = (3 * out,)
    both("attn_pool.attn.out_proj", out, out)
    both("attn_pool.ln_q", out)
    both("attn_pool.ln_kv", out)
    both("ln_post", out)
    shapes[f"{VISUAL}proj"] = (out, out)
    return shapes


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Of ordinary size everywhere, so that no bias, norm or table can be wrong unseen."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 0.3 * noise + (1 if name.endswith(".weight") else 0)
        else:
            weights[name] = noise * (1.0 if "embed" in name or "query" in name else (shape[-1] ** -0.5))
    side = config["visual"]["output_dim"]
    weights[f"{VISUAL}attn_pool.pos_embed"] = fixed_positions(16, side).float()
    return weights


def folder_of(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    write_folder_of(path, weights, max_shard_size=2_000_000)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 143}))
    return path


def slots(path: str) -> list[int]:
    """What the published tokenizer writes for an image: its path, one id per byte, then <imgpad>."""
    start = ODD["visual"]["image_start_id"]
    name = list(path.encode())
    return [start, *name, *[start + 2] * (256 - len(name)), start + 1]


def conversations() -> tuple[list[list[int]], list[list[Tensor]]]:
    """Two images with text around, none, and one: lengths below and beyond the trained length, to alphas of 3 and 7."""
    text = torch.randint(257, 311, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    ids = [
        [*text[:4], *slots("a/b.png"), *text[4:9], *slots("https://example.org/ü.jpg"), *text[9:15]],  # 531 tokens
        text[15:32],
        [*slots(""), *text[32:60], *text],  # 346
    ]
    generator = torch.Generator().manual_seed(4)

    def image(rows: int, columns: int) -> Tensor:
        return torch.randn(3, 6 * rows, 6 * columns, generator=generator)

    return ids, [[image(5, 5), image(5, 5)], [], [image(5, 5)]]
