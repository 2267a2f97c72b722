"""MoonViT and its projector against transformers' kimi_k25: same random weights, through the published names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlkit.layers.merge import merge_blocks
from vlkit.packing import Layout, Packed
from vlkit.projectors import pixel_shuffle
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector
from vlkit.vision import moonvit
from vlkit.vision.moonvit import MoonViT, MoonViTConfig

modeling = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")

# Rows and columns: odd and unequal for the tower alone, even for the projector. One equals the table, two are longer.
ODD = [(3, 5), (1, 1), (7, 7), (1, 6), (11, 2), (9, 4)]
EVEN = [(2, 6), (4, 4), (10, 2), (2, 2)]
CONFIG = MoonViTConfig(dim=48, num_layers=3, num_heads=4, mlp_dim=56, patch_size=6, position_grid=(7, 7))


def unpair(x: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k in the order of rotate-half: even channels of each head first, then the odd ones."""
    each = x.unflatten(0, (num_heads, -1, 2))  # [heads, pairs, 2, ...]
    return each.transpose(1, 2).flatten(0, 2)


def to_transformers(published: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Published names of the tower as kimi_k25 calls them."""
    renamed = {}
    for name, tensor in published.items():
        name = name.replace("pos_emb.weight", "pos_emb.position_embeddings").replace("encoder.blocks.", "layers.")
        name = name.replace("encoder.", "").replace("norm1.", "norm2.").replace("norm0.", "norm1.")
        name = name.replace("fc1.", "fc2.").replace("fc0.", "fc1.").replace("wo.", "attn.proj.")
        if "wqkv." in name:
            q, k, v = tensor.chunk(3)
            parts = {"q_proj": unpair(q, num_heads), "k_proj": unpair(k, num_heads), "v_proj": v}
            renamed |= {name.replace("wqkv.", f"attn.{part}."): value for part, value in parts.items()}
        else:
            renamed[name] = tensor
    return renamed


def randomized(module: nn.Module) -> nn.Module:
    """Weights of ordinary size everywhere, so that no norm, bias or table can be wrong unseen."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.2 if "weight" in name and parameter.ndim == 2 else 0.5)
    return module


def theirs(tower: MoonViT, merge_size: int = 1) -> nn.Module:
    config = tower.config
    reference = modeling.Kimi_K25VisionModel(
        modeling.Kimi_K25VisionConfig(
            patch_size=config.patch_size,
            pos_emb_height=config.position_grid[0],
            pos_emb_width=config.position_grid[1],
            num_attention_heads=config.num_heads,
            num_hidden_layers=config.num_layers,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            merge_kernel_size=(merge_size, merge_size),
            rope_parameters={"rope_type": "axial", "rope_theta": config.theta},
            attn_implementation="sdpa",
        )
    )
    published = moonvit.KEYS.to_theirs(tower.state_dict())
    reference.load_state_dict(to_transformers(published, config.num_heads), strict=True)
    return reference.eval()


def patches(grids: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Packed:
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, CONFIG.patch_dim, dtype=dtype), layout)


def run_theirs(reference: nn.Module, packed: Packed) -> Tensor:
    pixels = packed.tokens.view(-1, CONFIG.in_channels, CONFIG.patch_size, CONFIG.patch_size)
    return reference(pixels, grid_thw=torch.tensor(packed.layout.grids)).last_hidden_state


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max() / other.abs().max())


@torch.no_grad()
def test_tower_matches_kimi_k25() -> None:
    """fp32: largest seen 1e-6."""
    tower = randomized(MoonViT(CONFIG))
    packed = patches(ODD)
    assert relative(tower(packed).tokens, run_theirs(theirs(tower), packed).reshape(-1, CONFIG.dim)) < 1e-5


@torch.no_grad()
def test_projector_matches_kimi_k25() -> None:
    """Tower and projector together; fp32, largest seen 1e-6."""
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config

    tower = randomized(MoonViT(CONFIG))
    projector = randomized(PixelShuffleProjector(PixelShuffleConfig(in_dim=CONFIG.dim, out_dim=20)))
    packed = patches(EVEN)
    reference = theirs(tower, merge_size=2)
    config = Kimi_K25Config(
        vision_config=reference.config, text_config={"model_type": "deepseek_v3", "hidden_size": 20},
        projection_hidden_size=CONFIG.dim,
    )  # fmt: skip
    connector = modeling.Kimi_K25MultimodalProjection(config).eval()
    published = pixel_shuffle.KEYS.to_theirs(projector.state_dict())
    names = {"linear_1": "in_proj", "linear_2": "out_proj", "pre_norm": "pre_norm"}
    connector.load_state_dict({f"{names[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in published.items()})
    pixels = packed.tokens.view(-1, 3, CONFIG.patch_size, CONFIG.patch_size)
    merged = reference(pixels, grid_thw=torch.tensor(packed.layout.grids)).pooler_output
    assert relative(projector(tower(packed)).tokens, connector(merged).reshape(-1, 20)) < 1e-5


def test_gradients_match_kimi_k25() -> None:
    """Of every parameter; fp32, largest seen 3e-6 of the largest gradient."""
    tower = randomized(MoonViT(CONFIG))
    reference = theirs(tower)
    packed = patches(ODD)
    seed = torch.randn(packed.layout.num_tokens, CONFIG.dim)
    (tower(packed).tokens * seed).sum().backward()
    (run_theirs(reference, packed).reshape(-1, CONFIG.dim) * seed).sum().backward()
    ours = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    published = to_transformers(moonvit.KEYS.to_theirs(ours), CONFIG.num_heads)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None, name
        assert relative(published[name], parameter.grad) < 1e-4, name


# ---- a fixture that needs no other library


def fixture_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensor n holds 0.3 sin(1.7 k + n) at place k; weights of norms have 1 added. `shapes` is in the order of n."""
    weights = {}
    for n, (name, shape) in enumerate(shapes.items()):
        values = 0.3 * torch.sin(1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + n)
        weights[name] = (values + 1 if "norm" in name and name.endswith("weight") else values).view(shape)
    return weights


def fixture_shapes(dim: int = 16, mlp_dim: int = 24, out_dim: int = 12) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (dim, 3, 14, 14),
        "vision_tower.patch_embed.proj.bias": (dim,),
        "vision_tower.patch_embed.pos_emb.weight": (4, 4, dim),
    }
    linear = {"wqkv": (3 * dim, dim), "wo": (dim, dim), "mlp.fc0": (mlp_dim, dim), "mlp.fc1": (dim, mlp_dim)}
    for block in range(2):
        for part in ("norm0", "norm1", *linear):
            shape = linear.get(part, (dim,))
            shapes[f"vision_tower.encoder.blocks.{block}.{part}.weight"] = shape
            shapes[f"vision_tower.encoder.blocks.{block}.{part}.bias"] = shape[:1]
    for name, shape in (
        ("vision_tower.encoder.final_layernorm", (dim,)),
        ("multi_modal_projector.pre_norm", (dim,)),
        ("multi_modal_projector.linear_1", (4 * dim, 4 * dim)),
        ("multi_modal_projector.linear_2", (out_dim, 4 * dim)),
    ):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


@torch.no_grad()
def test_golden_values() -> None:
    """Made once in fp64 by another implementation, written with loops and complex numbers; also equal to kimi_k25."""
    config = MoonViTConfig(dim=16, num_layers=2, num_heads=2, mlp_dim=24, position_grid=(4, 4))
    parts = nn.ModuleDict(
        {"vision": MoonViT(config), "projector": PixelShuffleProjector(PixelShuffleConfig(in_dim=16, out_dim=12))}
    ).double()
    keys = moonvit.KEYS.mounted(theirs="vision_tower.", ours="vision.") + pixel_shuffle.KEYS.mounted(
        theirs="multi_modal_projector.", ours="projector."
    )
    parts.load_state_dict(keys.to_ours(fixture_weights(fixture_shapes())))
    layout = Layout.from_grids([(2, 4), (4, 4), (6, 2)])
    pixels = torch.sin(0.31 * torch.arange(36 * 588, dtype=torch.float64)).view(36, 588)

    features = parts["vision"](Packed(pixels, layout))
    merged = merge_blocks(features, 2).tokens.view(9, 4, 16)
    tokens = parts["projector"](features).tokens

    def close(ours: Tensor, golden: list[float]) -> None:
        torch.testing.assert_close(ours, torch.tensor(golden, dtype=torch.float64), atol=2e-6, rtol=0)

    close(torch.stack([merged.sum(), merged.abs().sum()]), [32.293534, 526.534714])
    close(merged[0, 0, :6], [-0.534277, -0.331438, 0.625001, -1.091695, 1.092914, -0.202474])
    close(merged[3, 2, :6], [0.053450, -0.508724, 0.548048, -1.073546, 1.465167, -0.485256])
    close(merged[8, 3, -6:], [0.865126, 0.883280, -0.561338, -0.642224, 2.163298, -1.412103])
    close(tokens.sum()[None], [-6.329180])
    close(tokens[0, :6], [1.291667, -1.858519, 0.057423, 1.763695, -1.317537, -0.694431])
    close(tokens[8, :6], [0.976807, -1.813242, 0.335768, 1.493939, -1.378331, -0.375646])
