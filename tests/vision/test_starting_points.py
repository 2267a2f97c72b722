"""Towers filled from encoders of transformers and timm give the features of those encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.vision.tower_cases import difference, randomized
from vlkit.errors import CheckpointError, ConfigError, KeyMismatchError
from vlkit.layers.patch import patchify
from vlkit.packing import Layout, Packed
from vlkit.vision import AIMv2, AIMv2Config, MoonViT, MoonViTConfig, SigLIP2, SigLIP2Config, load_starting_point

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

P, DIM, HEADS, LAYERS, GRID = 6, 32, 4, 2, 5
SIZES = {"dim": DIM, "num_layers": LAYERS, "num_heads": HEADS, "patch_size": P, "position_grid": (GRID, GRID)}
AIMV2 = AIMv2Config(**SIZES, mlp_dim=44, use_rope=False)
SIGLIP2 = SigLIP2Config(**SIZES, mlp_dim=48, use_rope=False)
SIGLIP = {
    "hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "patch_size": P,
}  # fmt: skip
MOONVIT = MoonViTConfig(**SIZES, mlp_dim=48, use_rope=False, norm_eps=1e-6)


def images() -> Tensor:
    return torch.randn(2, 3, GRID * P, GRID * P)


def packed(pixels: Tensor) -> Packed:
    return Packed(torch.cat([patchify(image, P) for image in pixels]), Layout.from_grids([(GRID, GRID)] * len(pixels)))


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def aimv2_of_transformers(**changes: object) -> nn.Module:
    config = transformers.Aimv2VisionConfig(
        hidden_size=DIM, intermediate_size=44, num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=P,
        image_size=GRID * P, attn_implementation="eager", **changes,
    )  # fmt: skip
    return randomized(transformers.Aimv2VisionModel(config))


def aimv2_of_timm() -> nn.Module:
    return randomized(timm.create_model(
        "aimv2_large_patch14_224", img_size=GRID * P, patch_size=P, embed_dim=DIM, depth=LAYERS, num_heads=HEADS,
        mlp_ratio=44 / DIM, num_classes=7,
    ))  # fmt: skip


def in_apple_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's AIMv2 as its authors first published it."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("head"):
            continue
        name = name.replace("patch_embed.", "preprocessor.patchifier.").replace("pos_embed", "preprocessor.pos_embed")
        name = name.replace("blocks.", "trunk.blocks.").replace("norm1.", "norm_1.").replace("norm2.", "norm_2.")
        name = name.replace("fc1_g.", "fc1.").replace("fc1_x.", "fc3.")
        renamed["trunk.post_trunk_norm.weight" if name == "norm.weight" else name] = tensor
    return renamed


def siglip_of_transformers(**changes: object) -> nn.Module:
    config = transformers.SiglipVisionConfig(**SIGLIP, image_size=GRID * P, **changes)
    return randomized(transformers.SiglipVisionModel(config))


def naflex_of_transformers() -> nn.Module:
    return randomized(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIGLIP, num_patches=GRID**2)))


def siglip_of_timm() -> nn.Module:
    """timm takes the exact GELU where nothing else is said; the published weights were trained with the other."""
    return randomized(timm.create_model(
        "vit_base_patch16_siglip_224", img_size=GRID * P, patch_size=P, embed_dim=DIM, depth=LAYERS, num_heads=HEADS,
        mlp_ratio=48 / DIM, act_layer="gelu_tanh", num_classes=7,
    ))  # fmt: skip


def naflex_of_timm() -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    return randomized(NaFlexVit(NaFlexVitCfg(
        patch_size=P, embed_dim=DIM, depth=LAYERS, num_heads=HEADS, mlp_ratio=48 / DIM, act_layer="gelu_tanh",
        global_pool="map", pos_embed_grid_size=(GRID, GRID),
    ), num_classes=7))  # fmt: skip


def naflex_patches(pixels: Tensor) -> dict[str, Tensor]:
    """Patches as NaFlex encoders take them: each flattened as (row, column, channel)."""
    cut = pixels.unflatten(3, (GRID, P)).unflatten(2, (GRID, P))  # [images, channels, rows, P, columns, P]
    return {
        "patches": cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "valid": torch.ones(len(pixels), GRID**2, dtype=torch.long),
        "shapes": torch.tensor([[GRID, GRID]] * len(pixels)),
        "coordinates": torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(len(pixels), -1, -1),
    }


def features(kind: str, theirs: nn.Module, pixels: Tensor) -> Tensor:
    """Of all patches of all images."""
    given = naflex_patches(pixels)
    if kind == "transformers":
        found = theirs(pixels).last_hidden_state
    elif kind == "timm":
        found = theirs.forward_features(pixels)
    elif kind == "transformers, NaFlex":
        found = theirs(given["patches"], given["valid"], given["shapes"]).last_hidden_state
    else:
        found = theirs.forward_features(given["patches"], given["coordinates"], given["valid"].bool())["patches"]
    return found.flatten(0, 1)


# ---- AIMv2


def test_aimv2_starts_from_transformers(tmp_path: Path) -> None:
    """With its head, which is left out. fp32, largest seen 5e-7."""
    theirs, tower, pixels = aimv2_of_transformers(), AIMv2(AIMV2), images()
    found = load_starting_point(tower, saved(tmp_path, theirs.state_dict()))
    assert (found.layout, found.prefix, found.table) == ("transformers", "", "5x5, as published")
    assert {name.split(".")[0] for name in found.dropped} == {"head"}
    assert difference(tower(packed(pixels)).tokens, features("transformers", theirs, pixels)) < 1e-5


@pytest.mark.parametrize("layout", ["timm", "Apple"])
def test_aimv2_starts_from_timm_and_apple(layout: str, tmp_path: Path) -> None:
    """fp32, largest seen 5e-7."""
    theirs, tower, pixels = aimv2_of_timm(), AIMv2(AIMV2), images()
    state = theirs.state_dict()
    found = load_starting_point(tower, saved(tmp_path, in_apple_names(state) if layout == "Apple" else state))
    assert (found.layout, found.table) == (layout, "5x5, as published")
    assert set(found.dropped) == ({"head.weight", "head.bias"} if layout == "timm" else set())
    assert difference(tower(packed(pixels)).tokens, features("timm", theirs, pixels)) < 1e-5


def test_an_aimv2_without_a_table_gives_sines(tmp_path: Path) -> None:
    """The native encoders of transformers and of Apple; fp32, largest seen 5e-7."""
    theirs, pixels = aimv2_of_transformers(is_native=True, use_head=False), images()
    folder = saved(tmp_path, theirs.state_dict())
    with torch.device("meta"):
        on_meta = AIMv2(AIMV2)
    for tower in (AIMv2(AIMV2), on_meta):
        found = load_starting_point(tower, folder)
        assert found.table == "sines and cosines"
        assert difference(tower(packed(pixels)).tokens, features("transformers", theirs, pixels)) < 1e-5
    bare = AIMv2(AIMV2.replace(use_positions=False))
    assert load_starting_point(bare, folder).table == "none"
    assert difference(bare.blocks[1].mlp.up.weight, tower.blocks[1].mlp.up.weight) == 0  # type: ignore[union-attr]


# ---- SigLIP


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("transformers", siglip_of_transformers),
        ("transformers, NaFlex", naflex_of_transformers),
        ("timm", siglip_of_timm),
        ("timm, NaFlex", naflex_of_timm),
    ],
)
@pytest.mark.parametrize("tower", ["siglip2", "moonvit"])
def test_siglip2_and_moonvit_start_from_siglip(
    kind: str, make: Callable[[], nn.Module], tower: str, tmp_path: Path
) -> None:
    """fp32, largest seen 5e-7."""
    theirs, pixels = make(), images()
    ours = SigLIP2(SIGLIP2) if tower == "siglip2" else MoonViT(MOONVIT)
    found = load_starting_point(ours, saved(tmp_path, theirs.state_dict()))
    assert (found.layout, found.table) == (kind, "5x5, as published")
    assert {name.split(".")[0] for name in found.dropped} == ({"attn_pool", "head"} if "timm" in kind else {"head"})
    assert difference(ours(packed(pixels)).tokens, features(kind, theirs, pixels)) < 1e-5


def test_text_towers_and_scales_are_left_out_and_named(tmp_path: Path) -> None:
    """As the published files have them: both towers and two scales, the vision tower under a prefix."""
    config = transformers.SiglipConfig(
        vision_config={**SIGLIP, "image_size": GRID * P},
        text_config={**SIGLIP, "vocab_size": 11, "projection_size": DIM, "max_position_embeddings": 4},
    )
    theirs, tower, pixels = randomized(transformers.SiglipModel(config)), SigLIP2(SIGLIP2), images()
    found = load_starting_point(tower, saved(tmp_path, theirs.state_dict()))
    assert found.prefix == "vision_model."
    assert {name.split(".")[0] for name in found.dropped} == {"text_model", "vision_model", "logit_scale", "logit_bias"}
    assert all(name.startswith("vision_model.head.") for name in found.dropped if name.startswith("vision_model."))
    assert difference(tower(packed(pixels)).tokens, features("transformers", theirs.vision_model, pixels)) < 1e-5


@pytest.mark.parametrize("name", ["AIMv2", "SigLIP2", "MoonViT"])
def test_a_tower_of_its_own_family_is_a_starting_point(name: str, tmp_path: Path) -> None:
    from vlkit.vision import aimv2, moonvit, siglip2

    make, config, keys, prefix = {
        "AIMv2": (AIMv2, AIMV2, aimv2.KEYS, "vision_encoder."),
        "SigLIP2": (SigLIP2, SIGLIP2, siglip2.KEYS, "vision_encoder.vision_model."),
        "MoonViT": (MoonViT, MOONVIT, moonvit.KEYS, "vision_tower."),
    }[name]
    theirs, ours = make(config), make(config)
    state = keys.mounted(theirs=prefix).to_theirs(theirs.state_dict())
    found = load_starting_point(ours, saved(tmp_path, {**state, "language_model.norm.weight": torch.ones(3)}))
    assert (found.prefix, found.dropped) == (prefix, ("language_model.norm.weight",))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_of_two_encoders_one_is_named(tmp_path: Path) -> None:
    states = {prefix: siglip_of_transformers().state_dict() for prefix in ("student.", "teacher.")}
    folder = saved(tmp_path, {prefix + n: t for prefix, state in states.items() for n, t in state.items()})
    tower = SigLIP2(SIGLIP2)
    with pytest.raises(CheckpointError, match=r"encoders under 'student\.', 'teacher\.'; say which with prefix="):
        load_starting_point(tower, folder)
    found = load_starting_point(tower, folder, prefix="teacher.")
    assert torch.equal(tower.norm.weight, states["teacher."]["post_layernorm.weight"])
    assert set(states["student."]) <= {name.removeprefix("student.") for name in found.dropped}


# ---- tables, dtypes, refusals


def test_a_table_of_another_grid_is_resampled_once(tmp_path: Path) -> None:
    """The features of a tower with the source's own table, which is resampled in every forward, at the new grid."""
    theirs = siglip_of_transformers()
    folder = saved(tmp_path, theirs.state_dict())
    native, moved = SigLIP2(SIGLIP2), SigLIP2(SIGLIP2.replace(position_grid=(7, 7)))
    load_starting_point(native, folder)
    assert load_starting_point(moved, folder).table == "5x5, resampled to 7x7"
    patches = Packed(torch.randn(49, SIGLIP2.patch_dim), Layout.from_grids([(7, 7)]))
    assert difference(moved(patches).tokens, native(patches).tokens) < 1e-6
    assert moved.positions is not None
    plain = torch.nn.functional.interpolate(
        theirs.embeddings.position_embedding.weight.view(1, 5, 5, DIM).movedim(3, 1), size=(7, 7), mode="bicubic"
    )
    assert difference(moved.positions.table, plain[0].movedim(0, 2)) < 1e-6


def test_a_tower_keeps_its_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path, siglip_of_transformers().bfloat16().state_dict())
    tower = SigLIP2(SIGLIP2)
    load_starting_point(tower, folder)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    with torch.device("meta"):
        fresh = SigLIP2(SIGLIP2)
    load_starting_point(fresh, folder)
    assert {(p.dtype, p.device.type) for p in fresh.parameters()} == {(torch.bfloat16, "cpu")}


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    state = siglip_of_transformers().state_dict()
    tower = SigLIP2(SIGLIP2)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    extra = saved(tmp_path / "extra", {**state, "encoder.layers.0.gate": torch.ones(3)})
    with pytest.raises(KeyMismatchError, match=r"encoder\.layers\.0\.gate"):
        load_starting_point(tower, extra)
    del state["encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(KeyMismatchError, match=r"blocks\.1\.mlp\.fc1\.bias <- encoder\.layers\.1\.mlp\.fc1\.bias"):
        load_starting_point(tower, saved(tmp_path / "less", state))
    wider = SigLIP2(SIGLIP2.replace(mlp_dim=52))
    with pytest.raises(KeyMismatchError, match="of another shape"):
        load_starting_point(wider, saved(tmp_path / "whole", siglip_of_transformers().state_dict()))
    with pytest.raises(CheckpointError, match="no patch embedding of such an encoder"):
        load_starting_point(AIMv2(AIMV2), tmp_path / "whole")
    with pytest.raises(ConfigError, match="no starting point is known for Linear, only for AIMv2, SigLIP2, MoonViT"):
        load_starting_point(nn.Linear(2, 2), tmp_path / "whole")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.parametrize(
    ("make", "tower", "stated", "words"),
    [
        (siglip_of_transformers, SigLIP2(SIGLIP2.replace(num_heads=2)), {"num_attention_heads": 4}, "num_heads=2"),
        (
            siglip_of_transformers,
            SigLIP2(SIGLIP2),
            {"layer_norm_eps": 1e-3},
            r"is 0\.001, the tower has norm_eps=1e-06",
        ),
        (
            siglip_of_transformers,
            SigLIP2(SIGLIP2),
            {"hidden_act": "quick_gelu"},
            "'quick_gelu', the tower has activation",
        ),
        (siglip_of_transformers, SigLIP2(SIGLIP2), {"hidden_act": "gelu"}, "is 'gelu', the tower has .*'gelu_tanh'"),
        (naflex_of_transformers, SigLIP2(SIGLIP2), {"patch_size": 14}, "patch_size is 14, the tower has patch_size=6"),
        (siglip_of_transformers, MoonViT(MOONVIT), {"layer_norm_eps": 1e-5}, "is 1e-05, the tower has norm_eps=1e-06"),
        (siglip_of_transformers, MoonViT(MOONVIT), {"hidden_act": "gelu"}, "is 'gelu'"),
        (aimv2_of_transformers, AIMv2(AIMV2.replace(num_heads=2)), {"num_attention_heads": 4}, "num_heads=2"),
        (aimv2_of_transformers, AIMv2(AIMV2), {"rms_norm_eps": 1e-6}, "is 1e-06, the tower has norm_eps=1e-05"),
        (aimv2_of_transformers, AIMv2(AIMV2), {"hidden_act": "gelu"}, "is 'gelu', the tower has activation='silu'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_no_shape_shows_is_compared_where_it_is_stated(
    make: Callable[[], nn.Module], tower: nn.Module, stated: dict[str, object], words: str, nested: bool, tmp_path: Path
) -> None:
    """The weights fit by names and shapes."""
    folder, values = saved(tmp_path, make().state_dict()), {"hidden_size": DIM, **stated}
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    (folder / "config.json").write_text(
        json.dumps({"vision_config": values, "hidden_act": "silu"} if nested else values)
    )
    with pytest.raises(ConfigError, match=words):
        load_starting_point(tower, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    (folder / "config.json").unlink()
    load_starting_point(tower, folder)


@pytest.mark.parametrize(
    ("make", "tower"),
    [
        (siglip_of_transformers, SigLIP2(SIGLIP2)),
        (siglip_of_transformers, MoonViT(MOONVIT.replace(norm_eps=1e-5))),
        (naflex_of_transformers, SigLIP2(SIGLIP2)),
        (aimv2_of_transformers, AIMv2(AIMV2)),
    ],
)
def test_what_transformers_states_of_its_encoders_passes(
    make: Callable[[], nn.Module], tower: nn.Module, tmp_path: Path
) -> None:
    """MoonViT has an epsilon of its own; the fields of a language model beside the encoder say nothing of the tower."""
    theirs: Any = make()
    theirs.save_pretrained(tmp_path)
    load_starting_point(tower, tmp_path)
    timm_states = {"architecture": "vit_base_patch16_siglip_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    for values in ({"hidden_size": 2 * DIM, "num_attention_heads": 99}, timm_states):
        (tmp_path / "config.json").write_text(json.dumps(values))
        load_starting_point(tower, tmp_path)
