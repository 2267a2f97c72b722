"""AndesVL's towers and projector against golden numbers, and the whole model against its parts and transformers' qwen3.

The figures were made in float64 by an implementation that shares no code with this one; the encoder code that AndesVL's
authors published gives the same to 6e-6 (AIMv2) and 2e-5 (SigLIP2).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import vlkit
from tests.vision.tower_cases import difference, randomized
from vlkit.hub.keymap import KeyMap
from vlkit.layers.patch import patchify
from vlkit.packing import Batch, Layout, Packed
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector
from vlkit.vision import aimv2, siglip2
from vlkit.vision.aimv2 import AIMv2, AIMv2Config
from vlkit.vision.siglip2 import SigLIP2, SigLIP2Config

AIMV2 = AIMv2Config(dim=64, num_layers=2, num_heads=4, mlp_dim=176, patch_size=14, position_grid=(4, 4))
SIGLIP2 = SigLIP2Config(dim=64, num_layers=2, num_heads=4, mlp_dim=128, patch_size=16, position_grid=(4, 4))
PROJECTOR_NAMES = {
    "fc1.bias": "mlp.0.bias",
    "fc1.weight": "mlp.0.weight",
    "fc2.bias": "mlp.2.bias",
    "fc2.weight": "mlp.2.weight",
}


def formula(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Parameter j in the order of names holds 0.15 sin(0.7 i + j) at place i; weights of norms 1 + 0.2 sin(...)."""
    state = {}
    for j, name in enumerate(sorted(shapes)):
        base = torch.sin(0.7 * torch.arange(math.prod(shapes[name]), dtype=torch.float64) + j)
        scale = 1 + 0.2 * base if "norm" in name and name.endswith("weight") else 0.15 * base
        state[name] = scale.view(shapes[name])
    return state


def filled(module: nn.Module, keys: KeyMap) -> nn.Module:
    published = keys.to_theirs(module.state_dict())
    module.double().load_state_dict(keys.to_ours(formula({n: tuple(t.shape) for n, t in published.items()})))
    return module.eval()


def images(patch_size: int) -> Packed:
    """Two images of 4 x 6 and 6 x 4 patches, pixels by a formula."""
    parts, grids = [], [(4, 6), (6, 4)]
    for rows, columns in grids:
        c, y, x = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) for n in (3, rows * patch_size, columns * patch_size)), indexing="ij"
        )
        parts.append(patchify(torch.sin(0.5 * c + 0.11 * y + 0.23 * x + 0.013 * x * y), patch_size))
    return Packed(torch.cat(parts), Layout.from_grids(grids))


def in_blocks(features: Packed) -> Tensor:
    """Features in the published order: by blocks of 2 x 2 patches."""
    return torch.cat(
        [
            image.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).flatten(0, 3)
            for image, (_, h, w) in zip(features.unpack(), features.layout.grids or (), strict=True)
        ]
    )


def near(tensor: Tensor, *golden: float, tolerance: float = 1e-5) -> None:
    """The figures have five decimals. Largest seen: 5e-6."""
    assert float((tensor - torch.tensor(golden, dtype=torch.float64)).abs().max()) <= tolerance, tensor.tolist()


@torch.no_grad()
def test_aimv2_golden_numbers() -> None:
    features = filled(AIMv2(AIMV2), aimv2.KEYS)(images(14))
    out = in_blocks(features)
    near(torch.stack([out.mean(), out.abs().mean()]), 0.014855, 0.851547, tolerance=1e-6)
    near(out[0, :4], 0.37295, 1.48367, -0.51986, -1.00267)
    near(out[1, :4], 0.25078, 1.46624, -0.57881, -1.05114)
    near(out[24, :4], 0.40096, 1.45504, -0.52832, -1.03145)
    near(out[47, -4:], 1.27465, -0.11148, 0.06800, 1.06601)

    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=64, out_dim=32, norm="none")).double()
    shapes = {PROJECTOR_NAMES[n]: tuple(t.shape) for n, t in projector.state_dict().items()}
    values = formula(shapes)
    projector.load_state_dict({ours: values[theirs] for ours, theirs in PROJECTOR_NAMES.items()})
    tokens = projector(features).tokens
    near(tokens.abs().mean()[None], 1.439149, tolerance=1e-6)
    near(tokens[0, :4], -1.73567, 1.96571, -1.93777, 1.74285)
    near(tokens[11, -4:], 2.03419, -1.93533, 1.64402, -1.77122)


@torch.no_grad()
def test_aimv2_golden_numbers_without_rotary_or_table() -> None:
    out = in_blocks(filled(AIMv2(AIMV2.replace(use_rope=False)), aimv2.KEYS)(images(14)))
    near(out.abs().mean()[None], 0.833615, tolerance=1e-6)
    near(out[1, :4], -0.21274, 1.29474, -1.12080, -0.75220)
    state = filled(AIMv2(AIMV2), aimv2.KEYS).state_dict()  # the numbering of the formula counts the table
    bare = AIMv2(AIMV2.replace(use_positions=False)).double()
    bare.load_state_dict({n: t for n, t in state.items() if n != "positions.table"})
    near(in_blocks(bare(images(14)))[1, :4], 0.19613, 1.62405, -0.40103, -1.00777)


@pytest.mark.parametrize(
    ("activation", "token"),
    [("gelu_tanh", (-1.36890, -0.77702, 0.08382, 0.44837)), ("gelu", (-1.36890, -0.77703, 0.08383, 0.44837))],
)
@torch.no_grad()
def test_siglip2_golden_numbers(activation: str, token: tuple[float, ...]) -> None:
    keys = siglip2.KEYS.mounted(theirs="vision_model.")
    tower = filled(SigLIP2(SIGLIP2.replace(activation=activation)), keys)
    out = in_blocks(tower(images(16)))
    near(out[1, :4], *token)
    if activation == "gelu_tanh":
        near(out.abs().mean()[None], 0.839430, tolerance=1e-6)
        near(out[47, -4:], 0.06627, -1.50880, -1.00990, 0.10640)


# ---- the whole model against its parts, put together by hand from the published tensors


def tower_by_hand(state: dict[str, Tensor], image: Tensor, config: AIMv2Config) -> Tensor:
    """AIMv2 over one image [3, height, width], from published names: a convolution, blocks of 2 x 2 patches throughout,
    F.interpolate, rotation by complex numbers. Returns [tokens, 4 dim]."""
    p, heads = config.patch_size, config.num_heads
    x = F.conv2d(
        image[None],
        state["preprocessor.patchifier.proj.weight"],
        state["preprocessor.patchifier.proj.bias"],
        stride=p,
    )
    h, w = x.shape[-2:]
    order = torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (config.dim,), state[name], config.norm_eps)

    x = norm(x[0].flatten(1).T[order], "preprocessor.patchifier.norm.weight")
    side = config.position_grid[0]
    table = state["preprocessor.pos_embed"].view(1, side, side, -1).permute(0, 3, 1, 2)
    x = x + F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)[0].flatten(1).T[order]
    row, col = torch.cartesian_prod(torch.arange(h), torch.arange(w))[order].double().T
    quarter = config.dim // heads // 4
    speed = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    turn = torch.polar(torch.ones(()).double(), torch.cat([row[:, None] * speed, col[:, None] * speed], 1))

    def turned(q: Tensor) -> Tensor:  # [heads, tokens, head_dim]
        first, second = q.double().chunk(2, dim=-1)
        z = torch.complex(first, second) * turn
        return torch.cat([z.real, z.imag], -1).to(q.dtype)

    for layer in range(config.num_layers):
        block = f"trunk.blocks.{layer}"
        y = norm(x, f"{block}.norm_1.weight") @ state[f"{block}.attn.qkv.weight"].T
        q, k, v = y.view(len(y), 3, heads, -1).permute(1, 2, 0, 3)
        scores = turned(q) @ turned(k).mT / math.sqrt(q.shape[-1])
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ state[f"{block}.attn.proj.weight"].T
        y = norm(x, f"{block}.norm_2.weight")
        gate, up = (y @ state[f"{block}.mlp.{name}.weight"].T for name in ("fc1", "fc3"))
        x = x + (F.silu(gate) * up) @ state[f"{block}.mlp.fc2.weight"].T
    return norm(x, "trunk.post_trunk_norm.weight").view(len(x) // 4, -1)


@torch.no_grad()
def test_the_whole_model_gives_the_logits_of_its_parts(tmp_path: Path) -> None:
    """A folder in the published layout: loaded here, and its tensors run by hand and by transformers' qwen3.

    fp32: largest seen 1e-6. Greedy answers agree. Saved again, the same names, shapes, types and bits.
    """
    transformers = pytest.importorskip("transformers")
    tower = AIMv2Config(dim=48, num_layers=2, num_heads=3, mlp_dim=52, patch_size=4, position_grid=(5, 5))
    source: Any = randomized(vlkit.create_model("andesvl-tiny", vision=tower.to_dict()), std=0.15)
    assert source.config.family == "andesvl"
    source.save_pretrained(tmp_path / "published")
    model = vlkit.from_pretrained(tmp_path / "published")
    state = load_file(tmp_path / "published" / "model.safetensors")
    text = json.loads((tmp_path / "published" / "config.json").read_text())["text_config"]
    text.pop("rope_scaling")
    decoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text, attn_implementation="eager")).eval()
    names = {n.removeprefix("language_model."): t for n, t in state.items() if n.startswith("language_model.")}
    decoder.load_state_dict({**names, "lm_head.weight": names["model.embed_tokens.weight"]})
    vision = {n.removeprefix("vision_encoder."): t for n, t in state.items() if n.startswith("vision_encoder.")}

    grids = [(2, 6), (8, 4), (2, 2)]
    pictures = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in grids]
    mark, tokens = model.config.image_token_id, [rows * columns // 4 for rows, columns in grids]
    sequences = [[7, *[mark] * tokens[0], 9, 260, *[mark] * tokens[1], 3], [1, 2, 3, 4], [*[mark] * tokens[2], 5]]
    want, answers, left = [], [], [*pictures]
    for ids in sequences:
        embeddings = decoder.model.embed_tokens(torch.tensor(ids))
        seen = []
        while sum(map(len, seen)) < ids.count(mark):
            merged = tower_by_hand(vision, left.pop(0), tower)
            hidden = F.gelu(F.linear(merged, state["mlp.0.weight"], state["mlp.0.bias"]))
            seen.append(F.linear(hidden, state["mlp.2.weight"], state["mlp.2.bias"]))
        if seen:
            embeddings[torch.tensor(ids) == mark] = torch.cat(seen)
        want.append(decoder(inputs_embeds=embeddings[None]).logits[0])
        answers.append([])
        while len(answers[-1]) < 4:  # greedy, everything anew for every token
            answers[-1].append(int(decoder(inputs_embeds=embeddings[None]).logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, decoder.model.embed_tokens(torch.tensor(answers[-1][-1:]))])

    batch = Batch(
        Packed(torch.tensor([token for ids in sequences for token in ids]), Layout(tuple(map(len, sequences)))),
        Packed(torch.cat([patchify(picture, 4) for picture in pictures]), Layout.from_grids(grids)),
    )
    for ours, theirs in zip(model(batch).unpack(), want, strict=True):
        assert difference(ours, theirs) < 2e-5
    assert model.generate(batch, max_new_tokens=4, stop=()) == answers

    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in state.items())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "published" / "config.json").read_text()
