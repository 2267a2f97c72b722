"""SelfAttention against its formula."""

from __future__ import annotations

import torch

from vlkit.layers.rope import grid_positions, make_rotary, rotary_angles, rotary_frequencies_2d
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout


def test_self_attention_is_its_formula() -> None:
    layout = Layout.from_grids([(2, 3), (1, 4)])
    block = SelfAttention(16, 2, pairing="interleaved").double()
    x = torch.randn(10, 16, dtype=torch.float64)
    frequencies, axes = rotary_frequencies_2d(8, 100.0, arrangement="alternating")
    rotary = make_rotary(rotary_angles(grid_positions(layout).double(), frequencies, axes))
    first = SelfAttention.forward(
        block, x[:6], type(rotary)(rotary.cos[:6], rotary.sin[:6]), Layout((6,)), backend="plain"
    )
    assert torch.allclose(block(x, rotary, layout)[:6], first, atol=1e-14)
    without = block(x, None, layout)
    q, k, v = (proj(x[6:]).view(4, 2, 8).transpose(0, 1) for proj in (block.q, block.k, block.v))
    want = block.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(without[6:], want)
