"""What holds for all of Qwen's towers: packs of images and clips, frames apart, published sizes and names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.vision.qwen_towers import visual
from tests.vision.tower_cases import difference, gradients, patches_of, tiny
from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout, Packed
from vlkit.registry import component
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViTConfig

GRIDS: list[tuple[int, ...]] = [(3, 5), (1, 1), (3, 6, 5), (1, 9), (2, 10, 2), (3, 5)]
towers = pytest.mark.parametrize("name", ["qwen2-vit", "qwen2.5-vit", "qwen3-vit"])


def alone(tower: nn.Module, packed: Packed) -> list[Tensor]:
    """The features of every item by itself."""
    return [
        tower(Packed(tokens, Layout.from_grids([grid]))).tokens
        for tokens, grid in zip(packed.unpack(), packed.layout.grids or (), strict=True)
    ]


@towers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_pack_gives_what_each_item_gives_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Features, and the gradients of every parameter."""
    tower = tiny(name, dtype)
    packed = patches_of(tower, GRIDS)
    together, apart = tower(packed), torch.cat(alone(tower, packed))
    assert together.layout == packed.layout
    assert difference(together.tokens, apart) < tolerance
    for ours, theirs in zip(gradients(tower, together.tokens), gradients(tower, apart), strict=True):
        assert difference(ours, theirs) < 10 * tolerance


@towers
@torch.no_grad()
def test_a_clip_is_its_frames(name: str) -> None:
    """Attention stays inside a frame, and time turns nothing."""
    tower = tiny(name)
    clip = patches_of(tower, [(3, 6, 5)])
    frames = tower(Packed(clip.tokens, Layout.from_grids([(6, 5)] * 3)))
    assert torch.equal(tower(clip).tokens, frames.tokens)


@towers
@torch.no_grad()
def test_a_frame_changes_no_bit_of_another(name: str) -> None:
    tower = tiny(name, torch.float32)
    packed = patches_of(tower, GRIDS)
    frames = packed.layout.frames()
    before = Packed(tower(packed).tokens, frames).unpack()
    other = packed.tokens.clone()
    start, end = frames.offsets[3:5]
    other[start:end] = float("nan")
    after = Packed(tower(packed.with_tokens(other)).tokens, frames).unpack()
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != 3 for i in range(len(before))]


@towers
@torch.no_grad()
def test_rows_and_columns_are_told_apart(name: str) -> None:
    """A transposed image gives other features."""
    tower = tiny(name)
    patches = patches_of(tower, [(2, 3)]).tokens
    wide = tower(Packed(patches, Layout.from_grids([(2, 3)]))).tokens
    turned = patches.view(2, 3, -1).transpose(0, 1).flatten(0, 1)
    tall = tower(Packed(turned, Layout.from_grids([(3, 2)]))).tokens.view(3, 2, -1).transpose(0, 1).flatten(0, 1)
    assert difference(wide, tall) > 1e-2


@towers
@torch.no_grad()
def test_the_plain_backend_agrees(name: str) -> None:
    tower = tiny(name)
    packed = patches_of(tower, GRIDS)
    features = tower(packed).tokens
    tower.attention_backend = "plain"
    assert difference(features, tower(packed).tokens) < 1e-13


@towers
def test_checkpointing_changes_no_bit_and_keeps_less(name: str) -> None:
    tower = tiny(name, torch.float32)
    packed = patches_of(tower, GRIDS)
    results, held = [], []
    for tower.gradient_checkpointing in (False, True):
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = tower(packed).tokens
        held.append(sum(kept.values()))
        results.append((features, *gradients(tower, features)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert held[1] < held[0] / 2


@torch.inference_mode()
def _infer(tower: nn.Module, packed: Packed) -> Tensor:
    return tower(packed).tokens


@towers
def test_training_after_inference_on_the_same_layout_works(name: str) -> None:
    """What is kept per layout must not be an inference tensor that autograd refuses."""
    tower = tiny(name)
    packed = patches_of(tower, [(5, 3), (2, 2, 9), (4, 4)])
    features = _infer(tower, packed)
    again = tower(packed).tokens
    assert torch.equal(features, again)
    assert all(bool(grad.isfinite().all()) for grad in gradients(tower, again))


@towers
def test_bfloat16_stays_close(name: str) -> None:
    """Largest seen 0.02 of the largest feature."""
    made = component("vision", name)
    tower = made.module(made.configs[f"{name}-tiny"])
    packed = patches_of(tower, GRIDS)
    exact = tower(packed).tokens
    half = tower.bfloat16()(packed).tokens
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), exact) < 0.05


# ---- published sizes and names


@pytest.mark.parametrize(
    ("name", "out_dim", "whole", "language_model", "num_names"),
    [
        # Parameters of the published model and of its decoder, which was published by itself too.
        ("qwen2-vit", 1536, 2_208_985_600, 1_543_714_304, 391),  # Qwen2-VL-2B, Qwen2-1.5B
        ("qwen2.5-vit", 2048, 3_754_622_976, 3_085_938_688, 390),  # Qwen2.5-VL-3B, Qwen2.5-3B
        ("qwen3-vit-small", 2048, 2_127_532_032, 1_720_574_976, 315),  # Qwen3-VL-2B, Qwen3-1.7B
        ("qwen3-vit-small", 2560, 4_437_815_808, 4_022_468_096, 315),  # Qwen3-VL-4B, Qwen3-4B
    ],
)
def test_published_parameter_counts(name: str, out_dim: int, whole: int, language_model: int, num_names: int) -> None:
    """Tower and merger are what a published model has beside its decoder."""
    with torch.device("meta"):
        both = visual(component("vision", name).configs[name], out_dim=out_dim)  # type: ignore[arg-type]
    assert sum(p.numel() for p in both.parts.parameters()) == whole - language_model
    assert len(both.published()) == num_names


@pytest.mark.parametrize(
    ("name", "some"),
    [
        (
            "qwen2-vit",
            {
                "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
                "blocks.31.norm1.bias": (1280,),
                "blocks.0.attn.qkv.weight": (3840, 1280),
                "blocks.0.attn.proj.bias": (1280,),
                "blocks.5.mlp.fc1.weight": (5120, 1280),
                "blocks.5.mlp.fc2.bias": (1280,),
                "merger.ln_q.bias": (1280,),
                "merger.mlp.0.weight": (5120, 5120),
                "merger.mlp.2.weight": (64, 5120),
            },
        ),
        (
            "qwen2.5-vit-72b",
            {
                "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
                "blocks.31.norm2.weight": (1280,),
                "blocks.0.attn.qkv.bias": (3840,),
                "blocks.5.mlp.gate_proj.weight": (3456, 1280),
                "blocks.5.mlp.up_proj.bias": (3456,),
                "blocks.5.mlp.down_proj.weight": (1280, 3456),
                "merger.ln_q.weight": (1280,),
            },
        ),
        (
            "qwen3-vit",
            {
                "patch_embed.proj.weight": (1152, 3, 2, 16, 16),
                "patch_embed.proj.bias": (1152,),
                "pos_embed.weight": (2304, 1152),
                "blocks.26.attn.qkv.weight": (3456, 1152),
                "blocks.5.mlp.linear_fc1.weight": (4304, 1152),
                "merger.norm.weight": (1152,),
                "merger.linear_fc2.weight": (64, 4608),
                "deepstack_merger_list.0.norm.bias": (4608,),
                "deepstack_merger_list.2.linear_fc1.weight": (4608, 4608),
            },
        ),
    ],
    ids=["qwen2", "qwen2.5", "qwen3"],
)
def test_published_names(name: str, some: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        published = visual(component("vision", name).configs[name], out_dim=64).published()  # type: ignore[arg-type]
    assert {part: tuple(published[part].shape) for part in some} == some
    assert not {"merger.norm2.weight", "deepstack_merger_list.3.norm.weight", "blocks.32.norm1.weight"} & set(published)


@towers
def test_names_survive_the_round_trip(name: str) -> None:
    config = component("vision", name).configs[f"{name}-tiny"]
    both = visual(config, out_dim=8)  # type: ignore[arg-type]
    state = both.parts.state_dict()
    again = both.keys.to_ours(both.keys.to_theirs(state))
    assert set(again) == set(state)
    assert all(torch.equal(again[part], state[part]) for part in state)


def test_the_norms_have_the_published_epsilon() -> None:
    for name in ("qwen2-vit", "qwen2.5-vit", "qwen3-vit"):
        with torch.device("meta"):
            both = visual(component("vision", name).configs[name], out_dim=64)  # type: ignore[arg-type]
        assert {module.eps for module in both.parts.modules() if hasattr(module, "eps")} == {1e-6}


# ---- what is refused


@towers
def test_bad_input_is_named(name: str) -> None:
    tower = tiny(name)
    with pytest.raises(LayoutError, match="from_grids"):
        tower(Packed(torch.zeros(4, 96), Layout((4,))))
    with pytest.raises(
        LayoutError, match=r"patches have shape \(4, 95\); expected 96 values each: 3 channels of 2 frames"
    ):
        tower(Packed(torch.zeros(4, 95), Layout.from_grids([(2, 2)])))


def test_contradicting_sizes_are_named() -> None:
    for config in (Qwen2ViTConfig, Qwen25ViTConfig, Qwen3ViTConfig):
        with pytest.raises(ConfigError, match=f"{config.__name__}: dim=36 is not a multiple of 4 \\* num_heads=16"):
            config(dim=36, num_heads=4)
    with pytest.raises(ConfigError, match=r"full_layers: \(3, 32\) must rise and stay below num_layers=32"):
        Qwen25ViTConfig(full_layers=(3, 32))
    with pytest.raises(ConfigError, match=r"taps: \(8, 3\) must rise"):
        Qwen3ViTConfig(taps=(8, 3))
    with pytest.raises(ConfigError, match=r"window of 27 pixels holds no block of 2x2 patches.*at least 28"):
        Qwen25ViTConfig(window_size=27)


@towers
def test_no_images_give_no_features(name: str) -> None:
    tower = tiny(name)
    features = tower(Packed(torch.zeros(0, 96), Layout((), ())))
    assert features.tokens.shape == (0, tower.config.out_dim)
    assert all(not bool(grad.any()) for grad in gradients(tower, features.tokens))
