"""AndesVL's towers and projector against golden numbers, and the whole model against its parts and transformers' qwen3.

The figures were made in float64 by an implementation that shares no code with this one; the encoder code that AndesVL's
authors published gives the same to 6e-6 (AIMv2) and 2e-5 (SigLIP2).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vlkit.hub.keymap import KeyMap
from vlkit.layers.patch import patchify
from vlkit.packing import Layout, Packed
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
