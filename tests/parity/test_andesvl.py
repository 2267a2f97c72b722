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
from vlkit.models import VLMConfig, andesvl
from vlkit.packing import Batch, Layout, Packed
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector
from vlkit.vision import aimv2, siglip2
from vlkit.vision.aimv2 import AIMv2, AIMv2Config
from vlkit.vision.siglip2 import SigLIP2, SigLIP2Config

transformers = pytest.importorskip("transformers")

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


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """One image, q, k, v [heads, tokens, head_dim], turned as complex numbers at places [tokens, (row, column)]."""
    quarter = q.shape[-1] // 4
    speed = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    turn = torch.polar(torch.ones(()).double(), (places.double()[:, :, None] * speed).flatten(1))

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        return torch.cat([z.real, z.imag], -1).to(x.dtype)

    scores = turned(q) @ turned(k).mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def table_by_hand(table: Tensor, h: int, w: int) -> Tensor:
    side = math.isqrt(table.shape[-2])
    cells = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(cells, size=(h, w), mode="bicubic", align_corners=False)[0].flatten(1).T


def aimv2_by_hand(state: dict[str, Tensor], x: Tensor, places: Tensor, config: AIMv2Config) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (config.dim,), state[f"{name}.weight"], config.norm_eps)

    x = norm(x, "preprocessor.patchifier.norm")
    h, w = (places.amax(0) + 1).tolist()
    x = x + table_by_hand(state["preprocessor.pos_embed"], h, w)[places[:, 0] * w + places[:, 1]]
    for block in (f"trunk.blocks.{layer}" for layer in range(config.num_layers)):
        y = norm(x, f"{block}.norm_1") @ state[f"{block}.attn.qkv.weight"].T
        q, k, v = y.view(len(y), 3, config.num_heads, -1).permute(1, 2, 0, 3)
        x = x + attention_by_hand(q, k, v, places) @ state[f"{block}.attn.proj.weight"].T
        y = norm(x, f"{block}.norm_2")
        gate, up = (y @ state[f"{block}.mlp.{name}.weight"].T for name in ("fc1", "fc3"))
        x = x + (F.silu(gate) * up) @ state[f"{block}.mlp.fc2.weight"].T
    return norm(x, "trunk.post_trunk_norm")


def siglip2_by_hand(state: dict[str, Tensor], x: Tensor, places: Tensor, config: SigLIP2Config) -> Tensor:
    def both(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"vision_model.{name}.weight"], state[f"vision_model.{name}.bias"]
        return (
            F.linear(x, weight, bias)
            if weight.ndim == 2
            else F.layer_norm(x, bias.shape, weight, bias, config.norm_eps)
        )

    h, w = (places.amax(0) + 1).tolist()
    table = table_by_hand(state["vision_model.embeddings.pos_embed.weight"], h, w)
    x = x + table[places[:, 0] * w + places[:, 1]]
    for block in (f"encoder.layers.{layer}" for layer in range(config.num_layers)):
        y = both(x, f"{block}.layer_norm1")
        q, k, v = (
            both(y, f"{block}.self_attn.{n}_proj").view(len(y), config.num_heads, -1).transpose(0, 1) for n in "qkv"
        )
        x = x + both(attention_by_hand(q, k, v, places), f"{block}.self_attn.out_proj")
        y = both(both(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
        x = x + both(F.gelu(y, approximate="tanh"), f"{block}.mlp.fc2")
    return both(x, "post_layernorm")


class ByHand:
    """A folder in the published layout, run from its tensors: a convolution, blocks of 2 x 2 patches throughout, and
    transformers' qwen3."""

    def __init__(self, folder: Path, config: VLMConfig) -> None:
        self.config: Any = config
        self.state = {n: t.requires_grad_() for n, t in load_file(folder / "model.safetensors").items()}
        text = json.loads((folder / "config.json").read_text())["text_config"]
        text.pop("rope_scaling")
        self.decoder = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**text, attn_implementation="eager")
        ).eval()
        names = {n.removeprefix("language_model."): t for n, t in self.state.items() if n.startswith("language_model.")}
        self.decoder.load_state_dict({**names, "lm_head.weight": names["model.embed_tokens.weight"]})

    def image(self, picture: Tensor) -> Tensor:
        """[tokens, dim] of one image [3, height, width]."""
        vision = self.config.vision
        state = {n.removeprefix("vision_encoder."): t for n, t in self.state.items()}
        aim = isinstance(vision, AIMv2Config)
        where = "preprocessor.patchifier.proj" if aim else "vision_model.embeddings.proj"
        kernel = state[f"{where}.weight"].view(vision.dim, 3, vision.patch_size, vision.patch_size)
        x = F.conv2d(picture[None], kernel, state[f"{where}.bias"], stride=vision.patch_size)[0]
        h, w = x.shape[1:]
        order = torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten()
        places = torch.stack([order // w, order % w], dim=1)
        x = (aimv2_by_hand if aim else siglip2_by_hand)(state, x.flatten(1).T[order], places, vision)
        hidden = F.gelu(F.linear(x.view(h * w // 4, -1), state["mlp.0.weight"], state["mlp.0.bias"]))
        return F.linear(hidden, state["mlp.2.weight"], state["mlp.2.bias"])

    def embeddings(self, ids: list[int], pictures: list[Tensor]) -> Tensor:
        text, mark = torch.tensor(ids), self.config.image_token_id
        embedded = self.decoder.model.embed_tokens(text)
        if not pictures:
            return embedded
        return embedded.index_put(((text == mark).nonzero().squeeze(1),), torch.cat([*map(self.image, pictures)]))

    def logits(self, embeddings: Tensor) -> Tensor:
        return self.decoder(inputs_embeds=embeddings[None]).logits[0]

    @torch.no_grad()
    def answer(self, embeddings: Tensor, length: int) -> list[int]:
        """Greedy, everything anew for every token."""
        ids: list[int] = []
        while len(ids) < length:
            ids.append(int(self.logits(embeddings)[-1].argmax()))
            embeddings = torch.cat([embeddings, self.decoder.model.embed_tokens(torch.tensor(ids[-1:]))])
        return ids

    def gradients(self) -> dict[str, Tensor | None]:
        found = {name: tensor.grad for name, tensor in self.state.items()}
        return {**found, **{f"language_model.{n}": p.grad for n, p in self.decoder.named_parameters()}}


AIMV2_ODD = AIMv2Config(dim=48, num_layers=2, num_heads=3, mlp_dim=52, patch_size=4, position_grid=(5, 5))
SIGLIP2_ODD = SigLIP2Config(dim=48, num_layers=2, num_heads=3, mlp_dim=52, patch_size=4, position_grid=(5, 5))
IMAGES = [[(2, 6), (8, 4)], [], [(2, 2)]]  # rows and columns of patches, for each sequence
whole = pytest.mark.parametrize(("name", "tower"), [("andesvl-tiny", AIMV2_ODD), ("andesvl-siglip2-tiny", SIGLIP2_ODD)])


def case(name: str, tower: AIMv2Config | SigLIP2Config, folder: Path) -> tuple[Any, ByHand, Batch, list[Tensor]]:
    """A model from a folder in the published layout, the same by hand, a batch, and its embeddings by hand."""
    source: Any = randomized(vlkit.create_model(name, vision=tower.to_dict()), std=0.15)
    assert source.config.family == "andesvl"
    source.save_pretrained(folder)
    model = vlkit.from_pretrained(folder)
    hand, mark = ByHand(folder, model.config), model.config.image_token_id
    sequences, pictures, embeddings = [], [], []
    for grids in IMAGES:
        ids = [7]
        for rows, columns in grids:
            ids += [*[mark] * (rows * columns // 4), 260, 9]
        own = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in grids]
        embeddings.append(hand.embeddings(ids, own))
        sequences.append(ids)
        pictures += own
    batch = Batch(
        Packed(torch.tensor([token for ids in sequences for token in ids]), Layout(tuple(map(len, sequences)))),
        Packed(
            torch.cat([patchify(picture, 4) for picture in pictures]),
            Layout.from_grids(g for own in IMAGES for g in own),
        ),
    )
    return model, hand, batch, embeddings


@whole
def test_the_whole_model_gives_the_logits_and_answers_of_its_parts(
    name: str, tower: AIMv2Config | SigLIP2Config, tmp_path: Path
) -> None:
    """fp32: largest seen 1e-6."""
    model, hand, batch, embeddings = case(name, tower, tmp_path)
    for ours, theirs in zip(model(batch).unpack(), map(hand.logits, embeddings), strict=True):
        assert difference(ours, theirs) < 1e-5
    assert model.generate(batch, max_new_tokens=4, stop=()) == [hand.answer(each, 4) for each in embeddings]


@whole
def test_the_whole_model_gives_the_gradients_of_its_parts(
    name: str, tower: AIMv2Config | SigLIP2Config, tmp_path: Path
) -> None:
    """Of every published tensor; fp32: largest seen 4e-6 of the largest of each."""
    model, hand, batch, embeddings = case(name, tower, tmp_path)
    want = [hand.logits(each) for each in embeddings]
    seeds = [torch.randn(each.shape) for each in want]
    torch.stack([(ours * seed).sum() for ours, seed in zip(model(batch).unpack(), seeds, strict=True)]).sum().backward()
    torch.stack([(theirs * seed).sum() for theirs, seed in zip(want, seeds, strict=True)]).sum().backward()
    ours = andesvl.keys(model.config).to_theirs({n: p.grad for n, p in model.named_parameters()})
    for published, theirs in hand.gradients().items():
        # The softmax does not see what keys share, so the gradient of their bias is rounding alone.
        if published != "language_model.lm_head.weight" and not published.endswith("k_proj.bias"):
            assert theirs is not None
            assert difference(ours[published], theirs) < 2e-5, published


@whole
def test_saving_gives_the_folder_that_was_read(name: str, tower: AIMv2Config | SigLIP2Config, tmp_path: Path) -> None:
    """The same names, shapes, types, bits and config.json."""
    model, hand, _, _ = case(name, tower, tmp_path / "published")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == hand.state.keys()
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in hand.state.items())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "published" / "config.json").read_text()
