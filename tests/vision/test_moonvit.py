"""MoonViT by itself: packing, compiling, checkpointing, published sizes and names, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout, Packed
from vlkit.registry import component
from vlkit.vision.moonvit import KEYS, MoonViT, MoonViTConfig

GRIDS = [(3, 5), (1, 1), (6, 6), (1, 7), (10, 2), (3, 5)]


def tiny(dtype: torch.dtype = torch.float64, **changes: object) -> MoonViT:
    return MoonViT(tiny_config().replace(**changes)).to(dtype)


def tiny_config() -> MoonViTConfig:
    config = component("vision", "moonvit-tiny").configs["moonvit-tiny"]
    assert isinstance(config, MoonViTConfig)
    return config


def images(tower: MoonViT, grids: list[tuple[int, int]] = GRIDS) -> Packed:
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, tower.config.patch_dim, dtype=tower.norm.weight.dtype), layout)


def gradients(tower: MoonViT, features: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, features.shape[1], dtype=features.dtype)
    return list(torch.autograd.grad((features * weights).sum(), list(tower.parameters())))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_a_pack_gives_what_each_image_gives_alone(dtype: torch.dtype, tolerance: float) -> None:
    """Features, and gradients summed over the images."""
    tower = tiny(dtype)
    packed = images(tower)
    together = tower(packed)
    alone = [
        tower(Packed(tokens, Layout.from_grids([grid])))
        for tokens, grid in zip(packed.unpack(), packed.layout.grids or (), strict=True)
    ]
    assert together.layout == packed.layout
    for ours, theirs in zip(together.unpack(), alone, strict=True):
        assert difference(ours, theirs.tokens) < tolerance
    summed = [sum(parts) for parts in zip(*(gradients(tower, x.tokens) for x in alone), strict=True)]
    for ours, theirs in zip(gradients(tower, together.tokens), summed, strict=True):
        assert difference(ours, theirs) < 10 * tolerance  # type: ignore[arg-type]


@torch.no_grad()
def test_an_image_changes_no_bit_of_another() -> None:
    tower = tiny(torch.float32)
    packed = images(tower)
    before = tower(packed).unpack()
    other = packed.tokens.clone()
    start, end = packed.layout.offsets[2:4]
    other[start:end] = float("nan")
    after = tower(packed.with_tokens(other)).unpack()
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True, True]


@torch.no_grad()
def test_the_plain_backend_agrees() -> None:
    tower = tiny()
    packed = images(tower)
    features = tower(packed).tokens
    tower.attention_backend = "plain"
    assert difference(features, tower(packed).tokens) < 1e-13


def test_checkpointing_changes_no_bit() -> None:
    tower = tiny(torch.float32)
    packed = images(tower)
    plain = tower(packed).tokens
    want = gradients(tower, plain)
    tower.gradient_checkpointing = True
    again = tower(packed).tokens
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(want, gradients(tower, again), strict=True))


def test_checkpointing_keeps_less() -> None:
    """Bytes that autograd holds for the backward."""
    held = []
    for checkpointing in (False, True):
        tower = tiny(torch.float32, num_layers=4)
        tower.gradient_checkpointing = checkpointing
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            tower(images(tower))
        held.append(sum(kept.values()))
    assert held[1] < held[0] / 3


def test_rows_and_columns_are_told_apart() -> None:
    """A transposed image gives other features: with rotary embedding, and by the table alone."""
    for use_rope in (True, False):
        tower = tiny(use_rope=use_rope)
        patches = images(tower, [(2, 3)]).tokens
        wide = tower(Packed(patches, Layout.from_grids([(2, 3)]))).tokens
        turned = patches.view(2, 3, -1).transpose(0, 1).flatten(0, 1)
        tall = tower(Packed(turned, Layout.from_grids([(3, 2)]))).tokens.view(3, 2, -1).transpose(0, 1).flatten(0, 1)
        assert difference(wide, tall) > 1e-2


def test_without_tables_position_is_rotary_alone() -> None:
    """All patches alike and a zero table: only the rotary embedding could tell them apart, and values do not turn."""
    for use_rope in (True, False):
        tower = tiny(use_rope=use_rope)
        torch.nn.init.zeros_(tower.positions.table)
        packed = images(tower, [(3, 4)])
        features = tower(packed)
        order = torch.randperm(12)
        shuffled = tower(packed.with_tokens(packed.tokens[order])).tokens
        assert (difference(shuffled, features.tokens[order]) < 1e-12) is (not use_rope)


@torch.inference_mode()
def _infer(tower: MoonViT, packed: Packed) -> Tensor:
    return tower(packed).tokens


def test_training_after_inference_on_the_same_layout_works() -> None:
    """What is kept per layout must not be an inference tensor that autograd refuses."""
    tower = tiny()
    packed = images(tower, [(5, 3), (2, 9), (4, 4)])
    features = _infer(tower, packed)
    again = tower(packed).tokens
    assert torch.equal(features, again)
    assert all(bool(grad.isfinite().all()) for grad in gradients(tower, again))


def test_bfloat16_stays_close() -> None:
    """Largest seen 0.02 of the largest feature."""
    tower = tiny(torch.float32)
    packed = images(tower)
    exact = tower(packed).tokens
    half = tower.bfloat16()(packed).tokens
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), exact) < 0.05


# ---- published sizes and names


def test_published_sizes() -> None:
    with torch.device("meta"):
        tower = MoonViT(MoonViTConfig())
    assert sum(p.numel() for p in tower.parameters()) == 416_866_032
    assert tower.config.head_dim == 72
    assert tower.config.patch_dim == 588
    assert tower.config.out_dim == 1152
    assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_published_names() -> None:
    with torch.device("meta"):
        state = MoonViT(MoonViTConfig()).state_dict()
    published = {name: tuple(t.shape) for name, t in KEYS.to_theirs(state).items()}
    assert len(published) == 329
    assert published["patch_embed.proj.weight"] == (1152, 3, 14, 14)
    assert published["patch_embed.pos_emb.weight"] == (64, 64, 1152)
    assert published["encoder.blocks.26.wqkv.weight"] == (3456, 1152)
    assert published["encoder.blocks.0.wqkv.bias"] == (3456,)
    assert published["encoder.blocks.0.wo.weight"] == (1152, 1152)
    assert published["encoder.blocks.5.mlp.fc0.weight"] == (4304, 1152)
    assert published["encoder.blocks.5.mlp.fc1.bias"] == (1152,)
    assert {"encoder.blocks.0.norm0.weight", "encoder.blocks.0.norm1.bias", "encoder.final_layernorm.weight"} <= set(
        published
    )
    assert not [name for name in published if ".norm2." in name or ".fc2." in name]


def test_names_survive_the_round_trip() -> None:
    state = tiny().state_dict()
    again = KEYS.to_ours(KEYS.to_theirs(state))
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_weights_start_as_published() -> None:
    torch.manual_seed(1)
    tower = MoonViT(MoonViTConfig(dim=64, num_layers=1, num_heads=4, mlp_dim=160, position_grid=(16, 16)))
    assert abs(float(tower.positions.table.detach().std()) - 1) < 0.05
    mlp = tower.blocks[0].mlp  # type: ignore[union-attr]
    for linear in (mlp.fc1, mlp.fc2):
        std = (2 / linear.in_features) ** 0.5
        assert abs(float(linear.weight.detach().std()) / std - 1) < 0.05
        assert float(linear.weight.detach().abs().max()) <= 2.0  # torch cuts at absolute 2, far outside
        assert not bool(linear.bias.any())


def test_meta_then_reset_gives_a_working_tower() -> None:
    with torch.device("meta"):
        tower = MoonViT(tiny_config())
    tower = tower.to_empty(device="cpu")
    for part in tower.parameters():
        part.data.fill_(float("nan"))
    for module in reversed(list(tower.modules())):
        if module is not tower and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert bool(tower(images(tower)).tokens.isfinite().all())


# ---- what is refused


def test_bad_input_is_named() -> None:
    tower = tiny(max_grid_side=9)
    with pytest.raises(LayoutError, match="image 1: a grid of 2x10 patches is longer than 9"):
        tower(images(tower, [(9, 9), (2, 10)]))
    with pytest.raises(LayoutError, match="from_grids"):
        tower(Packed(torch.zeros(4, tower.config.patch_dim), Layout((4,))))
    with pytest.raises(LayoutError, match=r"patches have shape \(4, 47\); expected 48 values"):
        tower(Packed(torch.zeros(4, 47), Layout.from_grids([(2, 2)])))
    with pytest.raises(ConfigError, match="dim=36 is not a multiple of 4 \\* num_heads=16"):
        MoonViTConfig(dim=36, num_heads=4)


def test_the_published_limit_is_512_patches() -> None:
    assert MoonViTConfig().max_grid_side == 512


def test_no_images_give_no_features() -> None:
    tower = tiny()
    features = tower(Packed(torch.zeros(0, tower.config.patch_dim), Layout((), ())))
    assert features.tokens.shape == (0, 32)
    assert all(not bool(grad.any()) for grad in gradients(tower, features.tokens))
