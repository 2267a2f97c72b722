"""Numbers of Qwen's towers and mergers, made once in fp32 by transformers 5.23 and by a second implementation."""

from __future__ import annotations

import pytest
import torch

from tests.golden import check, fill, sequence
from tests.vision.qwen_towers import TowerConfig, from_blocks, visual
from vlkit.packing import Layout, Packed
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViTConfig

QWEN2 = Qwen2ViTConfig(dim=64, num_layers=2, num_heads=2, mlp_dim=128)
QWEN25 = Qwen25ViTConfig(dim=64, num_layers=4, num_heads=2, mlp_dim=80, window_size=56, full_layers=(1, 3))
QWEN3 = Qwen3ViTConfig(dim=64, num_layers=4, num_heads=2, mlp_dim=80, position_grid=(6, 6), taps=(0, 1, 2))

Row = tuple[float, float, float, list[float], list[float]]
FEATURES: dict[TowerConfig, Row] = {
    QWEN2: (
        -0.03443889, 7.49859462, 347.1373183, [-8.916627, 8.344458, 4.496944, -9.353551], [11.970716, 0.990944]
    ),
    QWEN25: (
        0.04179068, 8.27100514, 396.5954876, [-14.559591, 13.830133, 3.888661, -9.801141], [9.695822, 4.535563]
    ),
    QWEN3: (
        0.01441539, 9.08719540, 421.1583549, [-10.744572, 12.284515, -11.901075, 3.289556], [-12.100001, 12.548452]
    ),
}  # fmt: skip
IMAGE: dict[TowerConfig, list[Row]] = {
    QWEN2: [(0.02602385, 0.48432326, 9.9730711, [-0.229736, 0.205783, 0.291553, -0.074419], [0.50867, 0.065502])],
    QWEN25: [(0.03459191, 0.50379678, 10.8778533, [-0.318286, 0.360675, -0.043507, 0.248674], [0.434869, 0.220923])],
    QWEN3: [
        (0.03242416, 0.93773310, 17.6245829, [-0.901236, 1.077127, -0.672442, 0.955055], [-1.0168, -0.193167]),
        (-0.16829624, 1.04578607, 22.9332998, [1.088706, -2.100564, 0.729403, 0.355846], [0.999653, -0.104767]),
        (-0.22004262, 1.23590353, 22.2695065, [-1.662169, 0.940422, -0.877945, 0.991296], [-1.034639, 0.866618]),
        (-0.13630303, 0.61038967, 12.1653416, [-0.858946, 1.209613, 0.074723, -0.930148], [-1.178123, -1.036799]),
    ],
}
VIDEO: dict[TowerConfig, Row] = {
    QWEN2: (0.02780785, 0.41971425, 14.2869001, [-0.809583, 0.72048, 0.927685, -0.11996], [0.186368, 0.686589]),
    QWEN25: (0.03895890, 0.41501738, 14.2562638, [-1.069606, 0.526544, 0.960862, 0.140397], [0.299091, 0.430448]),
    QWEN3: (0.01522162, 0.60943823, 17.9581085, [-0.797, 1.159947, -1.384849, -0.110406], [0.04733, -0.211345]),
}


def pixels(config: TowerConfig, name: str, grid: tuple[int, int, int]) -> Packed:
    layout = Layout.from_grids([grid])
    rows = sequence(name, layout.num_tokens * config.patch_dim).float()
    return from_blocks(rows.view(layout.num_tokens, config.patch_dim), layout)


@pytest.mark.parametrize("config", [QWEN2, QWEN25, QWEN3], ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_features_and_tokens_are_the_golden_ones(config: TowerConfig) -> None:
    """The image and the video of one pack. First and last patch are the same in every order."""
    both = visual(config, out_dim=48)
    both.load(_without_prefix(fill({"model.visual." + name: t.shape for name, t in both.published().items()})))
    frames = 3 if config is QWEN3 else 4
    image, video = pixels(config, "pixel_values", (1, 4, 6)), pixels(config, "pixel_values_videos", (frames, 4, 4))
    features = both.tower(Packed.concat([video, image]))
    check(features.unpack()[1][:, : config.dim], *FEATURES[config])
    of_video, of_image = both.merger(features).unpack()
    for level, row in zip(of_image.split(48, dim=1), IMAGE[config], strict=True):
        check(level, *row)
    check(of_video[:, :48], *VIDEO[config])


def _without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model.visual."): tensor for name, tensor in weights.items()}


def test_the_sequence_is_the_one_the_numbers_were_made_with() -> None:
    want = torch.tensor([0.99188496, 0.50164029, 0.01139563, -0.47884904], dtype=torch.float64)
    torch.testing.assert_close(sequence("pixel_values", 4), want, atol=1e-8, rtol=0)
