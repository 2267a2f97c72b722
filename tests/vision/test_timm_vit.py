"""timm's vision transformers as packed towers, against timm itself; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlkit.errors import ConfigError, KeyMismatchError, LayoutError, UnknownModelError
from vlkit.layers.patch import patchify
from vlkit.packing import Layout, Packed
from vlkit.testing.batches import random_patches
from vlkit.vision.timm_vit import TimmViT, TimmViTConfig

timm = pytest.importorskip("timm")

SMALL = (("img_size", 32), ("patch_size", 4), ("embed_dim", 48), ("depth", 2), ("num_heads", 4))
SIZES = [(32, 32), (20, 28), (4, 4), (64, 12), (32, 32)]  # pixels; the first is the model's own
NAMES = [
    "vit_tiny_patch16_224",  # a class token
    "vit_small_patch14_dinov2.lvd142m",  # layer scale
    "vit_small_patch14_reg4_dinov2",  # registers; positions on patches alone
    "vit_base_patch16_siglip_224",  # no class token, a pooling head
    "vit_base_patch16_clip_224",  # a norm before the blocks
    "test_vit3",  # registers, mean pooling
    "vit_base_patch16_rpn_224",  # norms behind attention and MLP
    "deit_small_distilled_patch16_224",  # a second class token
    "aimv2_1b_patch14_224",  # RMSNorm, gated MLP, no biases
    "eva02_base_patch14_224",  # EVA: rotary and table, biases of q and v, sub-norms
    "vit_small_patch16_dinov3",  # rotary alone, in centred coordinates
]


def randomized(tower: TimmViT) -> TimmViT:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tower.eval()


def packed(images: list[Tensor], patch_size: int) -> Packed:
    grids = [(image.shape[1] // patch_size, image.shape[2] // patch_size) for image in images]
    return Packed(torch.cat([patchify(image, patch_size) for image in images]), Layout.from_grids(grids))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_are_timms(name: str) -> None:
    """At the model's own size as it is, at others with dynamic_img_size; fp32, largest seen 7e-7 relative."""
    tower = randomized(TimmViT(TimmViTConfig(name=name, arguments=SMALL)))
    images = [torch.randn(3, *size, generator=torch.Generator().manual_seed(size[0])) for size in SIZES]
    features = tower(packed(images, 4)).unpack()
    for index, (ours, image) in enumerate(zip(features, images, strict=True)):
        dynamic = {"dynamic_img_size": True} if index else {}
        theirs = timm.create_model(name, num_classes=0, **dict(SMALL), **dynamic).eval()
        fit = theirs.load_state_dict(tower.trunk.state_dict(), strict=False)
        assert not fit.unexpected_keys
        assert all(key.startswith(("attn_pool.", "fc_norm.")) for key in fit.missing_keys)
        want = theirs.forward_features(image[None])[0, theirs.num_prefix_tokens :]
        assert (ours - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_features_of_a_middle_layer_are_timms() -> None:
    """Without the last norm, and with the table shrunk as the original DINOv2 does it."""
    arguments = (*SMALL[:3], ("depth", 3), ("num_heads", 4))
    config = TimmViTConfig(
        name="vit_small_patch14_dinov2", arguments=arguments, num_layers=2, final_norm=False, antialias=False
    )
    tower = randomized(TimmViT(config))
    assert len(tower.trunk.blocks) == 2
    theirs = timm.create_model(config.name, num_classes=0, **dict(arguments)).eval()
    theirs.load_state_dict(tower.trunk.state_dict(), strict=False)
    image = torch.randn(3, 32, 32)
    want = theirs.forward_intermediates(
        image[None], indices=[1], norm=False, output_fmt="NLC", intermediates_only=True
    )[0][0]
    assert (tower(packed([image], 4)).tokens - want).abs().max() <= 1e-5 * want.abs().max()
    small = packed([torch.randn(3, 16, 16)], 4)
    averaged = TimmViT(config.replace(antialias=True)).eval()
    averaged.load_state_dict(tower.state_dict())
    assert (averaged(small).tokens - tower(small).tokens).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_packed_equals_alone_and_items_are_isolated(name: str) -> None:
    tower = randomized(TimmViT(TimmViTConfig(name=name, arguments=SMALL)).double())
    grids = [(3, 5), (1, 1), (8, 2)]
    patches = random_patches(grids, tower.config.patch_dim, dtype=torch.float64)
    together = tower(patches).unpack()
    for part, grid, ours in zip(patches.unpack(), grids, together, strict=True):
        assert (tower(Packed(part, Layout.from_grids([grid]))).tokens - ours).abs().max() < 1e-12
    changed = patches.tokens.clone()
    changed[15] = 3.0
    after = tower(patches.with_tokens(changed)).unpack()
    assert not torch.equal(after[1], together[1])
    assert torch.equal(after[0], together[0])
    assert torch.equal(after[2], together[2])
    clip = tower(Packed(patches.tokens[:12], Layout.from_grids([(2, 2, 3)])))
    frames = tower(Packed(patches.tokens[:12], Layout.from_grids([(2, 3), (2, 3)])))
    assert torch.equal(clip.tokens, frames.tokens)
    assert clip.layout.grids == ((2, 2, 3),)


def test_weights_come_from_a_state_dict_or_a_file(tmp_path) -> None:
    """With timm's names: heads and later blocks are left out, everything else must fit."""
    from safetensors.torch import save_file

    theirs = timm.create_model("test_vit3", num_classes=5)
    state = theirs.state_dict()
    tower = TimmViT(TimmViTConfig(name="test_vit3", num_layers=2, final_norm=False))
    tower.load_pretrained(state)
    assert torch.equal(tower.trunk.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    save_file(state, tmp_path / "model.safetensors")
    fresh = TimmViT(tower.config)
    fresh.load_pretrained(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), tower.parameters(), strict=True))
    with pytest.raises(KeyMismatchError, match=r"missing pos_embed; unknown pos_emb"):
        tower.load_pretrained({("pos_emb" if k == "pos_embed" else k): v for k, v in state.items()})
    with pytest.raises(KeyMismatchError, match=r"reg_token \[1, 1, 9\], expected"):
        tower.load_pretrained({**state, "reg_token": torch.zeros(1, 1, 9)})
    with pytest.raises(ConfigError, match=r"expected a \.safetensors file"):
        tower.load_pretrained(tmp_path / "model.bin")


def test_pretrained_weights_are_asked_of_timm_by_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def fake(name: str, *, pretrained: bool = False, **options: object):
        asked.append((name, pretrained))
        model = create(name, pretrained=False, **options)
        torch.nn.init.constant_(model.pos_embed, 0.5)
        return model

    tower = TimmViT(TimmViTConfig(name="test_vit.r160_in1k"))
    monkeypatch.setattr(timm, "create_model", fake)
    tower.load_pretrained()
    assert asked == [("test_vit.r160_in1k", True)]
    assert bool((tower.trunk.pos_embed == 0.5).all())


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (TimmViTConfig(name="swin_tiny_patch4_window7_224"), ConfigError, "its class is SwinTransformer"),
        (TimmViTConfig(name="convnext_tiny"), ConfigError, "its class is ConvNeXt.*VisionTransformer"),
        (TimmViTConfig(name="vit_tiny_r_s16_p8_224", arguments=(("depth", 1),)), ConfigError, "HybridEmbed"),
        (
            TimmViTConfig(name="vit_small_patch16_18x2_224", arguments=(("depth", 1),)),
            ConfigError,
            "ParallelThingsBlock",
        ),
        (TimmViTConfig(name="vit_small_patch16_rope_mixed_224"), ConfigError, "RotaryEmbeddingMixed"),
        (TimmViTConfig(name="vit_smal_patch14"), UnknownModelError, "the nearest are vit_small_patch"),
        (TimmViTConfig(name="hf-hub:owner/name"), ConfigError, "is a repository or a folder"),
        (TimmViTConfig(name="test_vit", arguments=(("dept", 2),)), ConfigError, "with the arguments dept=2"),
        (TimmViTConfig(name="test_vit", arguments=(("drop_path_rate", 0.1),)), ConfigError, "drops at random"),
        (TimmViTConfig(name="test_vit", arguments=(("patch_drop_rate", 0.1),)), ConfigError, "patch_drop_rate"),
        (TimmViTConfig(name="test_vit", arguments=(("num_heads", 0),)), ConfigError, "with the arguments num_heads=0"),
        (TimmViTConfig(name="test_vit", arguments=(("block_fn", "Block"),)), ConfigError, "block_fn='Block'"),
        (TimmViTConfig(name="test_vit.no_such_tag"), ConfigError, "no_such_tag"),
        (TimmViTConfig(name="test_vit", num_layers=7), ConfigError, "7 of the 6 blocks"),
    ],
    ids=lambda value: value.name if isinstance(value, TimmViTConfig) else None,
)
def test_what_cannot_be_packed_is_named(config: TimmViTConfig, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _ = config.out_dim
    with pytest.raises(error, match=words):
        TimmViT(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((("checkpoint_path", "stranger.pth"),), "'checkpoint_path' is not a size or an option"),
        ((("pretrained", True),), "'pretrained' is not a size or an option"),
        ((("depth", 2), ("depth", 3)), "'depth' is given twice"),
        ((("depth", 5000),), "depth=5000 is beyond 4096"),
        ((("embed_dim", 10**9),), "embed_dim=1000000000 is beyond"),
        ((("drop_path_rate", float("nan")),), "nan"),
    ],
)
def test_arguments_cannot_read_files_or_fill_memory(arguments: tuple[tuple[str, Any], ...], words: str) -> None:
    """They are in the config of a saved model, which may come from a stranger."""
    with pytest.raises(ConfigError, match=words):
        TimmViTConfig(name="test_vit", arguments=arguments)


def test_mistakes_are_named() -> None:
    tower = TimmViT(TimmViTConfig(name="test_vit"))
    with pytest.raises(LayoutError, match=r"\(4, 767\); expected 768 values"):
        tower(Packed(torch.zeros(4, 767), Layout.from_grids([(2, 2)])))
    with pytest.raises(ConfigError, match="arguments"):
        TimmViTConfig(arguments=(("depth", 2, 3),))  # type: ignore[arg-type]
