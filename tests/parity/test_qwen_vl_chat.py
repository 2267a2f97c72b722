"""Qwen-VL against the equations of its published code: golden numbers, and a plain second version of the whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlkit
from tests import golden
from tests.models.qwen_vl_files import ODD, VISUAL, conversations, folder_of, random_weights
from vlkit.hub.checkpoint import open_checkpoint
from vlkit.layers.patch import patchify
from vlkit.llm import qwen
from vlkit.llm.qwen import QwenConfig, build_qwen
from vlkit.packing import Batch, Layout, Packed
from vlkit.projectors import resampler
from vlkit.projectors.resampler import Resampler, ResamplerConfig
from vlkit.vision import openclip_vit
from vlkit.vision.openclip_vit import OpenCLIPViT, OpenCLIPViTConfig

# ---- the published code's equations, written out without packing, and without anything of vlkit


def resized(table: Tensor, rows: int, columns: int) -> Tensor:
    """A square table as a list of cells, for another grid."""
    side = math.isqrt(len(table))
    if (rows, columns) == (side, side):
        return table
    image = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def see(w: dict[str, Tensor], config: dict[str, Any], image: Tensor) -> Tensor:
    """Tokens [queries, output_dim] of one image [3, height, width]."""
    v = {name.removeprefix(VISUAL): tensor for name, tensor in w.items() if name.startswith(VISUAL)}
    size, heads = config["visual"]["patch_size"], config["visual"]["heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], v[f"{name}.weight"], v[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ v[f"{name}.weight"].T + v[f"{name}.bias"]

    x = F.conv2d(image[None], v["conv1.weight"], stride=size)
    rows, columns = x.shape[2:]
    x = x[0].flatten(1).T + resized(v["positional_embedding"], rows, columns)
    x = norm(x, "ln_pre")
    for layer in range(config["visual"]["layers"]):
        block = f"transformer.resblocks.{layer}"
        mixed = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj").view(len(x), heads, -1)
        head_dim = mixed.shape[-1] // 3
        out = []
        for head in range(heads):
            q, k, value = mixed[:, head].split(head_dim, dim=1)
            out.append(torch.softmax(q @ k.T / math.sqrt(head_dim), dim=-1) @ value)
        x = x + linear(torch.cat(out, dim=1), f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    pool = "attn_pool"
    kv = norm(x @ v[f"{pool}.kv_proj.weight"].T, f"{pool}.ln_kv")
    fixed = v[f"{pool}.pos_embed"]
    answers, _ = F.multi_head_attention_forward(
        norm(v[f"{pool}.query"], f"{pool}.ln_q") + fixed,
        kv + resized(fixed, rows, columns),
        kv,
        embed_dim_to_check=kv.shape[1],
        num_heads=kv.shape[1] // 128,
        in_proj_weight=v[f"{pool}.attn.in_proj_weight"],
        in_proj_bias=v[f"{pool}.attn.in_proj_bias"],
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=v[f"{pool}.attn.out_proj.weight"],
        out_proj_bias=v[f"{pool}.attn.out_proj.bias"],
        need_weights=False,
    )
    return norm(answers, "ln_post") @ v["proj"]


def read(
    w: dict[str, Tensor], config: dict[str, Any], ids: list[int], images: list[Tensor], prompt: int | None = None
) -> Tensor:
    """Logits [length, vocab] of one sequence; every <img> ... </img> holds the next image. While an answer is written, the
    wavelengths stay those of the prompt."""
    x = w["transformer.wte.weight"][ids].clone()
    start = config["visual"]["image_start_id"]
    openings = [i for i, token in enumerate(ids) if token == start]
    assert len(openings) == len(images)
    for opening, image in zip(openings, images, strict=True):
        tokens = see(w, config, image)
        assert ids[opening + 1 + len(tokens)] == start + 1
        x[opening + 1 : opening + 1 + len(tokens)] = tokens
    length, heads, hd = len(ids), config["num_attention_heads"], config["kv_channels"]
    trained = config["seq_length"]
    alpha = max(2 ** math.ceil(math.log2((prompt or length) / trained) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (hd / (hd - 2))
    angles = torch.tensor([[p * base ** (-2 * i / hd) for i in range(hd // 2)] for p in range(length)], dtype=x.dtype)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    grown = torch.tensor([max(math.log(p + 1) / math.log(trained), 1.0) for p in range(length)], dtype=x.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[:, hd // 2 :], x[:, : hd // 2]], dim=1) * sin

    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        mixed = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.c_attn.weight"].T + w[f"{block}.attn.c_attn.bias"]
        q, k, v = (part.view(length, heads, hd) for part in mixed.chunk(3, dim=1))
        out = []
        for head in range(heads):
            scores = turned(q[:, head]) * grown[:, None] @ turned(k[:, head]).T / math.sqrt(hd)
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
            out.append(torch.softmax(scores, dim=-1) @ v[:, head])
        x = x + torch.cat(out, dim=1) @ w[f"{block}.attn.c_proj.weight"].T
        h = norm(x, f"{block}.ln_2")
        product = (h @ w[f"{block}.mlp.w1.weight"].T) * F.silu(h @ w[f"{block}.mlp.w2.weight"].T)
        x = x + product @ w[f"{block}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max() / other.abs().max())


# ---- golden numbers of the published code at toy sizes


def test_golden_tower_and_resampler() -> None:
    """fp32; the table and the fixed positions are enlarged and shrunk: grids of 4x4 and 32x32 against tables of 16x16."""
    tower = OpenCLIPViT(OpenCLIPViTConfig(dim=48, num_layers=2, num_heads=3, mlp_dim=int(48 * 4.9231)))
    pool = Resampler(ResamplerConfig(in_dim=48, out_dim=128, num_heads=1))
    keys = {tower: openclip_vit.keys(tower.config), pool: resampler.KEYS}
    fixed = "attn_pool.pos_embed"
    for part, names in keys.items():
        theirs = names.to_theirs(part.state_dict())
        weights = golden.fill({VISUAL + name: tensor.shape for name, tensor in theirs.items()})
        named = {name: theirs[name] if name == fixed else weights[VISUAL + name] for name in theirs}
        part.load_state_dict(names.to_ours(named))
    assert abs(float(pool.positions.table.mean()) - 0.45020367) < 1e-7
    assert abs(float(pool.positions.table.norm()) - 128) < 1e-4

    for name, side, numbers in (
        ("qwen_vl_image", 56, (-0.04314147, 3.81072035, 819.2236668, (2.589697, -3.445585, -4.656876, 5.202516),
                               (5.28578, -4.766034))),
        ("qwen_vl_image2", 448, (-0.05586550, 4.54389501, 930.5817993, (3.707731, -5.011793, -5.21713, 5.97172),
                                 (-1.677578, -5.37529))),
    ):  # fmt: skip
        image = golden.sequence(name, 3 * side * side).view(3, side, side).float()
        patches = Packed(patchify(image, 14), Layout.from_grids([(side // 14, side // 14)]))
        with torch.no_grad():
            golden.check(pool(tower(patches)).tokens, *numbers)


def test_golden_decoder() -> None:
    """Below the trained length of 16 tokens, and at 40, where the wavelengths are of alpha 7 and queries are scaled."""
    config = QwenConfig(vocab_size=200, dim=64, num_layers=2, num_heads=4, head_dim=16, mlp_dim=96, trained_length=16)
    decoder, names = build_qwen(config).eval(), qwen.keys(config)
    shapes = {name: tensor.shape for name, tensor in names.to_theirs(decoder.state_dict()).items()}
    decoder.load_state_dict(names.to_ours(golden.fill(shapes)))
    first = (0.265515, 0.048602, 0.026628, 0.403897)
    for length, *numbers in (
        (8, -0.00320580, 0.56359445, 28.0581096, first, (0.042032, -0.554335)),
        (40, -0.00063261, 0.55597270, 61.4374552, first, (0.346063, 1.109471)),
    ):
        ids = torch.arange(length) * 7 % 200
        with torch.no_grad():
            golden.check(decoder.head(decoder(Packed(decoder.embed(ids), Layout((length,)))).hidden.tokens), *numbers)


# ---- the whole model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[vlkit.VisionLanguageModel, dict[str, Tensor], Path]:
    weights = random_weights(ODD)
    folder = folder_of(tmp_path_factory.mktemp("odd"), ODD, weights)
    return vlkit.from_pretrained(folder), weights, folder


def packed(
    model: vlkit.VisionLanguageModel,
    *,
    dtype: torch.dtype = torch.float32,
    cuts: tuple[int, int, int] = (0, 0, 0),
    left: bool = False,
) -> Batch:
    """The conversations, less some of their last tokens, as the padded tensors of the published tokenizer, and pixels."""
    ids, images = conversations()
    ids = [row[: len(row) - cut] for row, cut in zip(ids, cuts, strict=True)]
    longest = max(map(len, ids))
    padding = [[143] * (longest - len(row)) for row in ids]
    rows = [(pad + row if left else row + pad) for row, pad in zip(ids, padding, strict=True)]
    kept = [([0] * len(pad) + [1] * len(row))[:: 1 if left else -1] for row, pad in zip(ids, padding, strict=True)]
    return model.pack(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(kept),
        pixel_values=torch.stack([image for row in images for image in row]).to(dtype),
    )


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)], ids=str)
def test_logits_are_those_of_the_published_equations(loaded: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Against the equations in fp64. Largest seen: 7e-7 in fp32, 2e-15 in fp64."""
    model, weights, folder = loaded
    model = model if dtype == torch.float32 else vlkit.from_pretrained(folder, dtype=dtype)
    wide = {name: tensor.double() for name, tensor in weights.items()}
    logits = model(packed(model, dtype=dtype)).unpack()
    for ours, ids, images in zip(logits, *conversations(), strict=True):
        assert relative(ours.double(), read(wide, ODD, ids, [image.double() for image in images])) <= tolerance


@torch.no_grad()
def test_the_side_of_the_padding_changes_no_bit(loaded: Any) -> None:
    model = loaded[0]
    assert torch.equal(model(packed(model)).logits.tokens, model(packed(model, left=True)).logits.tokens)


@torch.no_grad()
def test_tokens_from_the_cache_have_the_logits_of_the_published_equations(loaded: Any) -> None:
    """Each against the equations over everything before it. One answer crosses the trained length of 300 tokens while it is
    written: that scales its queries, and leaves the wavelengths as the prompt had them."""
    model, weights, _ = loaded
    cuts, steps = (0, 0, 50), 6
    ids, images = conversations()
    texts = [row[: len(row) - cut] for row, cut in zip(ids, cuts, strict=True)]
    prompts = [len(text) for text in texts]
    assert prompts[2] <= ODD["seq_length"] < prompts[2] + steps
    cache = model.llm.new_cache(3, 600, dtype=torch.float32)
    answers = [text[-1] for text in model(packed(model, cuts=cuts), cache=cache).logits.unpack()]
    for _ in range(steps):
        tokens = [int(logits.argmax()) for logits in answers]
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        answers = model(Batch(Packed(torch.tensor(tokens), Layout((1, 1, 1)))), cache=cache).logits.unpack()
        for ours, text, pictures, prompt in zip(answers, texts, images, prompts, strict=True):
            want = read(weights, ODD, text, pictures, prompt=prompt)[-1]
            assert relative(ours[0], want) <= 2e-5  # fp32: largest seen 9e-7
    regrown = read(weights, ODD, texts[2], images[2])[-1]  # with the wavelengths of so long a prompt
    assert relative(regrown, want) > 1e-3


@torch.no_grad()
def test_images_of_any_shape_are_seen_as_by_the_published_equations(loaded: Any) -> None:
    """Grids that are not square, of one patch, and of the table's own size; all in one pack."""
    model, weights, _ = loaded
    grids = [(3, 7), (1, 1), (16, 16), (16, 16), (20, 2)]
    generator = torch.Generator().manual_seed(7)
    images = [torch.randn(3, 6 * rows, 6 * columns, generator=generator) for rows, columns in grids]
    patches = Packed(torch.cat([patchify(image, 6) for image in images]), Layout.from_grids(grids))
    tokens = model.encode_images(patches)
    assert tokens.layout.grids == ((1, 16, 16),) * 5
    for ours, image in zip(tokens.unpack(), images, strict=True):
        assert relative(ours, see(weights, ODD, image)) <= 2e-5  # fp32: largest seen 1e-6


@pytest.mark.parametrize("mistake", ["gate and up", "in_proj in thirds", "proj transposed", "positions on values"])
@torch.no_grad()
def test_the_comparison_sees_what_shapes_cannot(loaded: Any, mistake: str) -> None:
    """Weights that are mixed up without changing a shape give other logits by far more than the tolerance."""
    model, weights, _ = loaded
    mixed = dict(weights)
    if mistake == "gate and up":
        block = "transformer.h.1.mlp"
        mixed |= {
            f"{block}.w1.weight": weights[f"{block}.w2.weight"],
            f"{block}.w2.weight": weights[f"{block}.w1.weight"],
        }
    elif mistake == "in_proj in thirds":
        name = f"{VISUAL}transformer.resblocks.1.attn.in_proj.weight"
        mixed[name] = weights[name].view(3, 5, 7, 35).transpose(0, 1).reshape(105, 35)
    elif mistake == "proj transposed":
        mixed[f"{VISUAL}proj"] = weights[f"{VISUAL}proj"].T
    else:
        mixed[f"{VISUAL}attn_pool.pos_embed"] = weights[f"{VISUAL}attn_pool.pos_embed"].roll(1, 0)
    ids, images = (part[2] for part in conversations())
    ours = model(packed(model)).unpack()[2]
    assert relative(ours, read(mixed, ODD, ids, images)) > 1e-3


def test_a_saved_folder_has_the_same_names_shapes_types_and_bits(tmp_path: Path) -> None:
    """In the published type, bfloat16, with fixed positions that a fine-tuning has changed."""
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(ODD, seed=1).items()}
    weights[f"{VISUAL}attn_pool.pos_embed"] += 0.25
    config = {**ODD, "torch_dtype": "bfloat16"}
    model = vlkit.from_pretrained(folder_of(tmp_path / "theirs", config, weights))
    assert not model.projector.positions.table.requires_grad
    model.save_pretrained(tmp_path / "ours")
    with open_checkpoint(tmp_path / "ours") as saved:
        assert set(saved.tensors) == set(weights)
        for name, tensor in weights.items():
            again = saved.read(name)
            assert again.dtype == tensor.dtype, name
            assert torch.equal(again, tensor), name
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for name, value in written.items():
        if name not in ("auto_map", "visual", "eos_token_id"):  # what ends an answer came from generation_config.json
            assert config[name] == value, name
    assert written["visual"] | {"image_size": 448} == config["visual"]
    assert vlkit.from_pretrained(tmp_path / "ours").config == model.config
