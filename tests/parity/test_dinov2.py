"""Real weights in a timm tower: a ViT of DINOv2's small size finds the same points in two photographs.

The weights come out of an ONNX file (see tests/assets.py). Its matrices are anonymous; the node that multiplies by one says
which parameter it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.assets import asset
from vlkit.layers.patch import patchify
from vlkit.packing import Layout, Packed
from vlkit.vision.timm_vit import TimmViT, TimmViTConfig

pytest.importorskip("timm")

CONFIG = TimmViTConfig(
    name="vit_small_patch14_dinov2", antialias=False
)  # its table is shrunk as DINOv2's own code does it
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


# ---- the file


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def message(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: (number, value)."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        size, at = varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, data[at : at + size]
        at += size


def text(value: int | memoryview) -> str:
    return bytes(value).decode()  # type: ignore[arg-type]


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Published parameters by name: those that the file names, matrices by the node that uses them, the position table."""
    graph = next(value for number, value in message(memoryview(path.read_bytes())) if number == 7)
    tensors: dict[str, Tensor] = {}
    uses: dict[str, tuple[str, str]] = {}
    for number, value in message(graph):  # type: ignore[arg-type]
        parts: dict[int, list] = {}
        for field, inner in message(value) if number in (1, 5) else ():  # type: ignore[arg-type]
            parts.setdefault(field, []).append(inner)
        if number == 5 and parts.get(2) == [1] and 9 in parts:  # fp32, stored as bytes
            values = torch.frombuffer(bytearray(parts[9][0]), dtype=torch.float32)
            tensors[text(parts[8][0])] = values.view(parts.get(1, []))
        elif number == 1:
            uses |= {text(name): (text(parts[4][0]), text(parts[3][0])) for name in parts.get(1, ())}
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    table = {}
    for name, tensor in tensors.items():
        kind, node = uses[name]
        if kind == "MatMul":
            found[node.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = tensor.T
        elif tensor.ndim == 3 and kind in ("Concat", "Reshape"):
            table[kind] = tensor
    found["backbone.embeddings.position_embeddings"] = torch.cat([table["Concat"], table["Reshape"]], dim=1)
    return {name.removeprefix("backbone."): tensor for name, tensor in found.items()}


def timm_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as timm calls them; q, k and v are one matrix."""
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for layer in range(12):
        old, new = f"encoder.layer.{layer}.", f"blocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}attn.proj.{kind}"] = theirs[f"{old}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}{part}.{kind}"] = theirs[f"{old}{part}.{kind}"]
        for scale in ("1", "2"):
            state[f"{new}ls{scale}.gamma"] = theirs[f"{old}layer_scale{scale}.lambda1"]
    return state


@cache
def weights() -> dict[str, Tensor]:
    return read_onnx(asset("vit_s_focus.onnx"))


def photo(name: str, width: int, height: int) -> Tensor:
    image = Image.open(asset(name)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return ((pixels - MEAN) / STD).permute(2, 0, 1)


def packed(*images: Tensor) -> Packed:
    grids = [(image.shape[1] // 14, image.shape[2] // 14) for image in images]
    return Packed(torch.cat([patchify(image, 14) for image in images]), Layout.from_grids(grids))


# ---- what they do


@torch.no_grad()
def test_features_are_those_of_transformers_dinov2() -> None:
    """Photographs of another size and shape than the table, in one pack; fp32, largest seen 3e-6 of the largest feature."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, attn_implementation="sdpa"
        )
    ).eval()
    state = dict(weights())
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj")):
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    state = {name.replace("output.dense", "o_proj"): tensor for name, tensor in state.items()}
    theirs.load_state_dict(state | {"embeddings.mask_token": torch.zeros(1, 384)})  # strict: no name is left over
    tower = TimmViT(CONFIG).eval()
    tower.load_pretrained(timm_names(weights()))
    images = [photo("motorcycle_left.png", 224, 224), photo("motorcycle_left.png", 322, 140)]
    wants = [theirs(image[None]).last_hidden_state[0, 1:] for image in images]
    for ours, want in zip(tower(packed(*images)).unpack(), wants, strict=True):
        assert (ours - want).abs().max() <= 1e-5 * want.abs().max()
    averaged = TimmViT(CONFIG.replace(antialias=True)).eval()
    averaged.load_pretrained(timm_names(weights()))
    wrong = averaged(packed(images[0])).tokens  # as timm resizes the table, which is not how this model was trained
    assert (wrong - wants[0]).abs().max() > 0.02 * wants[0].abs().max()


def share_of_right_matches(tower: TimmViT) -> float:
    """Patches of the left photograph whose most similar patch of the right one lies within a patch of where it truly is."""
    rows, columns = 25, 37
    left, right = (
        torch.nn.functional.normalize(features - features.mean(0), dim=1)
        for features in tower(
            packed(*(photo(f"motorcycle_{side}.png", 14 * columns, 14 * rows) for side in ("left", "right")))
        ).unpack()
    )
    matches = (left @ right.T).argmax(1)
    with np.load(asset("motorcycle_disp.npz")) as file:
        shift = torch.from_numpy(file[file.files[0]]).float()
    shift = shift.masked_fill(~shift.isfinite(), float("nan")) * columns / shift.shape[1]  # in patches
    nearest = torch.nn.functional.interpolate(shift[None, None], size=(14 * rows, 14 * columns), mode="nearest")[0, 0]
    cells = nearest.view(rows, 14, columns, 14).transpose(1, 2).flatten(2)
    median = cells.nanmedian(2).values.flatten()
    known = median.isfinite()
    place = torch.arange(rows * columns)
    off_rows = (matches // columns - place // columns).abs()
    off_columns = (matches % columns - (place % columns - median)).abs()
    return float(((off_rows <= 1) & (off_columns <= 1))[known].float().mean())


@torch.no_grad()
def test_the_same_points_are_found_in_a_stereo_pair() -> None:
    """After layer 6: measured 0.83; a tower with random weights finds 0.44."""
    config = CONFIG.replace(num_layers=6, final_norm=False)
    torch.manual_seed(0)
    tower = TimmViT(config).eval()
    by_chance = share_of_right_matches(tower)
    tower.load_pretrained(timm_names(weights()))
    found = share_of_right_matches(tower)
    assert found >= 0.80
    assert found >= by_chance + 0.25
