"""The pooling head against transformers' SigLIP, which pools images of one size."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from vlkit.layers.pooling import AttentionPool
from vlkit.packing import Layout, Packed

transformers = pytest.importorskip("transformers")


def test_equals_siglips_head() -> None:
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    torch.manual_seed(0)
    theirs = SiglipMultiheadAttentionPoolingHead(
        transformers.SiglipVisionConfig(hidden_size=24, intermediate_size=40, num_attention_heads=3)
    )
    torch.nn.init.normal_(theirs.attention.in_proj_bias)
    ours = AttentionPool(24, 3, mlp_dim=40)
    state = theirs.state_dict()
    parts = {name: state[f"attention.in_proj_{name}"].chunk(3) for name in ("weight", "bias")}
    ours.load_state_dict(
        {f"{each}.{name}": parts[name][i] for name in parts for i, each in enumerate("qkv")}
        | {key.replace("attention.out_proj", "out").replace("layernorm", "norm"): value
           for key, value in state.items() if "in_proj" not in key and key != "probe"}
        | {"probe": state["probe"].flatten()}
    )  # fmt: skip
    x = torch.randn(5, 9, 24)
    with torch.no_grad():
        assert_close(ours(Packed(x.flatten(0, 1), Layout((9,) * 5))), theirs(x), rtol=1e-6, atol=1e-6)
