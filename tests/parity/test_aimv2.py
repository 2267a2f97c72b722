"""AIMv2 without rotary embedding against transformers' aimv2, and its rotary embedding against transformers' qwen2_5_vl."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.vision.tower_cases import difference, randomized
from vlkit.layers.patch import patchify
from vlkit.layers.rope import apply_rotary
from vlkit.packing import Layout, Packed
from vlkit.vision import AIMv2, AIMv2Config, load_starting_point

transformers = pytest.importorskip("transformers")

CONFIG = AIMv2Config(
    dim=48, num_layers=3, num_heads=3, mlp_dim=52, patch_size=6, position_grid=(5, 5), use_rope=False, norm_eps=1e-4
)


def reference(**changes: object) -> nn.Module:
    theirs = transformers.Aimv2VisionModel(
        transformers.Aimv2VisionConfig(
            hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3, patch_size=6, image_size=30,
            rms_norm_eps=1e-4, use_head=False, attn_implementation="eager", **changes,
        )
    )  # fmt: skip
    return randomized(theirs)


def loaded(theirs: nn.Module, folder: Path, config: AIMv2Config = CONFIG) -> AIMv2:
    save_file(theirs.state_dict(), folder / "model.safetensors")
    tower = AIMv2(config)
    load_starting_point(tower, folder)
    return tower


def in_their_names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours under the names of transformers."""
    words = {
        "blocks.": "encoder.layers.", "norm1.": "rms_norm1.", "norm2.": "rms_norm2.", "attn.out.": "attention.out_proj.",
        "mlp.gate.": "ffn.gate_proj.", "mlp.up.": "ffn.up_proj.", "mlp.down.": "ffn.down_proj.",
        "patch_embed.proj.": "embeddings.patch_embed.", "patch_norm.": "embeddings.rms_norm.",
        "positions.table": "embeddings.position_embedding.weight",
        **{f"attn.{part}.": f"attention.{part}_proj." for part in "qkv"},
    }  # fmt: skip
    renamed = {}
    for name, tensor in gradients.items():
        for before, after in words.items():
            name = name.replace(before, after)
        renamed["rms_norm.weight" if name == "norm.weight" else name] = tensor
    return renamed


def test_features_and_gradients(tmp_path: Path) -> None:
    """fp32; largest seen 1e-6 of the features, 4e-6 of the gradients."""
    theirs = reference()
    ours = loaded(theirs, tmp_path)
    images = torch.randn(3, 3, 30, 30)
    packed = Packed(torch.cat([patchify(image, 6) for image in images]), Layout.from_grids([(5, 5)] * 3))
    features, want = ours(packed).tokens, theirs(images).last_hidden_state.flatten(0, 1)
    assert difference(features, want) < 1e-5

    seed = torch.randn(features.shape)
    (features * seed).sum().backward()
    (want * seed).sum().backward()
    gradients = in_their_names({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert difference(gradients[name].reshape(parameter.shape), parameter.grad) < 2e-5, name


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (1, 7), (9, 2)])
@torch.no_grad()
def test_odd_sizes_with_sines_for_a_table(grid: tuple[int, int], tmp_path: Path) -> None:
    """The native encoder, whose sines fit every size. fp32, largest seen 1e-6."""
    theirs = reference(is_native=True)
    ours = loaded(theirs, tmp_path, CONFIG.replace(position_grid=grid))
    image = torch.randn(3, 6 * grid[0], 6 * grid[1])
    features = ours(Packed(patchify(image, 6), Layout.from_grids([grid]))).tokens
    assert difference(features, theirs(image[None]).last_hidden_state[0]) < 1e-5


def test_rotary_embedding_is_that_of_qwen2_5_vl() -> None:
    """Row first, halves of a head as pairs, from 0 in every image. Equal to rounding."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    tower = AIMv2(CONFIG.replace(use_rope=True))
    layout = Layout.from_grids([(3, 5), (2, 7)])
    q = torch.randn(layout.num_tokens, 3, 16)
    rotary = tower.rotary(layout)
    assert rotary is not None
    positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for _, h, w in layout.grids or ()])
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    angles = (positions[:, :, None] * frequencies).flatten(1)
    both = torch.cat([angles, angles], dim=-1)
    want, _ = apply_rotary_pos_emb_vision(q, q, both.cos(), both.sin())
    assert difference(apply_rotary(q, rotary, pairing="half"), want) < 1e-6
