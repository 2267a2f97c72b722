"""The towers and mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers': the same random weights through the
published names, images and clips of unequal grids in one pack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.vision.qwen_towers import TowerConfig, Visual, from_blocks, to_blocks, visual
from vlkit.packing import Layout
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViTConfig

transformers = pytest.importorskip("transformers")
OUT_DIM = 20
# Odd numbers of frames and of merge blocks; with windows of 4x4 patches some grids are multiples and some are not.
GRIDS = [(1, 6, 10), (3, 4, 8), (1, 2, 2), (2, 10, 2), (1, 8, 4), (5, 2, 6)]
CONFIGS: list[TowerConfig] = [
    Qwen2ViTConfig(dim=48, num_layers=3, num_heads=4, mlp_dim=96, patch_size=6),
    Qwen25ViTConfig(
        dim=48, num_layers=4, num_heads=4, mlp_dim=56, patch_size=6, window_size=24, full_layers=(1, 3)
    ),
    Qwen25ViTConfig(dim=48, num_layers=3, num_heads=2, mlp_dim=56, patch_size=4, window_size=31, full_layers=()),
    Qwen3ViTConfig(dim=48, num_layers=4, num_heads=4, mlp_dim=56, patch_size=6, position_grid=(7, 7), taps=(0, 2)),
    Qwen3ViTConfig(dim=24, num_layers=2, num_heads=2, mlp_dim=40, patch_size=4, position_grid=(3, 3), taps=(0, 1)),
]  # fmt: skip
IDS = ["qwen2", "qwen2.5", "qwen2.5-windows-alone", "qwen3", "qwen3-small-table"]


def reference(config: TowerConfig) -> nn.Module:
    """transformers' tower, its merger included."""
    sizes = {
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "temporal_patch_size": config.frames_per_patch,
        "spatial_merge_size": 2,
        "attn_implementation": "sdpa",
    }
    if isinstance(config, Qwen2ViTConfig):
        from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2

        ratio = config.mlp_dim / config.dim
        made = qwen2.Qwen2VLVisionConfig(**sizes, embed_dim=config.dim, hidden_size=OUT_DIM, mlp_ratio=int(ratio))
        return qwen2.Qwen2VisionTransformerPretrainedModel(made).eval()
    sizes |= {"hidden_size": config.dim, "intermediate_size": config.mlp_dim, "out_hidden_size": OUT_DIM}
    if isinstance(config, Qwen25ViTConfig):
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25

        made = qwen25.Qwen2_5_VLVisionConfig(
            **sizes, window_size=config.window_size, fullatt_block_indexes=list(config.full_layers)
        )
        return qwen25.Qwen2_5_VisionTransformerPretrainedModel(made).eval()
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    made = qwen3.Qwen3VLVisionConfig(
        **sizes,
        num_position_embeddings=config.position_grid[0] * config.position_grid[1],
        deepstack_visual_indexes=list(config.taps),
    )
    return qwen3.Qwen3VLVisionModel(made).eval()


def randomized(config: TowerConfig) -> Visual:
    """Weights of ordinary size everywhere, so that no norm, bias or table can be wrong unseen."""
    ours = visual(config, out_dim=OUT_DIM)
    for name, parameter in ours.parts.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            nn.init.normal_(parameter, std=0.2 if parameter.ndim == 2 else 0.5)
    return ours


def both(config: TowerConfig, dtype: torch.dtype) -> tuple[Visual, nn.Module, Tensor, Layout]:
    """Ours, theirs, and patches in the order of their processors."""
    ours, theirs = randomized(config), reference(config)
    theirs.load_state_dict(ours.published(), strict=True)
    layout = Layout.from_grids(GRIDS)
    return ours, theirs.to(dtype), torch.randn(layout.num_tokens, config.patch_dim, dtype=dtype), layout


def run_ours(ours: Visual, patches: Tensor, layout: Layout) -> list[Tensor]:
    """Features of the last block in the order of their processors, then the tokens of every level."""
    features = ours.tower(from_blocks(patches, layout))
    tokens = ours.merger(features).tokens.split(OUT_DIM, dim=1)
    return [to_blocks(features)[:, : ours.tower.config.dim], *tokens]


def run_theirs(theirs: nn.Module, patches: Tensor, layout: Layout) -> list[Tensor]:
    out = theirs(patches, grid_thw=torch.tensor(layout.grids))
    features = out.last_hidden_state
    if hasattr(theirs, "fullatt_block_indexes"):  # it leaves its features in the order of windows
        features = None
    return [features, out.pooler_output, *getattr(out, "deepstack_features", ())]


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@torch.no_grad()
def test_features_and_tokens_match(config: TowerConfig, dtype: torch.dtype, tolerance: float) -> None:
    """Largest seen: fp32 1e-6, fp64 3e-7, where their rotary angles stay fp32."""
    ours, theirs, patches, layout = both(config, dtype)
    ours.parts.to(dtype)
    for mine, other in zip(run_ours(ours, patches, layout), run_theirs(theirs, patches, layout), strict=True):
        if other is not None:
            assert relative(mine, other) < tolerance


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]], ids=[IDS[0], IDS[1], IDS[3]])
def test_gradients_match(config: TowerConfig) -> None:
    """Of every parameter and of the patches; fp32, largest seen 3e-6 of the largest of each."""
    ours, theirs, patches, layout = both(config, torch.float32)
    seeds = None
    found = []
    for run, module in ((run_ours, ours), (run_theirs, theirs)):
        leaf = patches.clone().requires_grad_()
        levels = run(module, leaf, layout)[1:]  # type: ignore[arg-type]
        seeds = [torch.randn_like(level) for level in levels] if seeds is None else seeds
        torch.stack([(level * seed).sum() for level, seed in zip(levels, seeds, strict=True)]).sum().backward()
        found.append(leaf.grad)
    assert relative(*found) < 1e-5  # type: ignore[arg-type]
    grads = ours.keys.to_theirs({name: p.grad for name, p in ours.parts.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        assert relative(grads[name], parameter.grad) < 1e-4, name
