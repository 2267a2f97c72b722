"""Texts packed end to end are encoded as each alone, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from vlkit.errors import ConfigError, LayoutError, TokenError
from vlkit.packing import Layout, Packed
from vlkit.training.text_encoder import TextEncoder, TextEncoderConfig

CONFIG = TextEncoderConfig(vocab_size=17, dim=12, num_layers=2, num_heads=3, mlp_dim=20)


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(CONFIG).double()


def texts(*lengths: int) -> Packed:
    generator = torch.Generator().manual_seed(1)
    return Packed(torch.randint(17, (sum(lengths),), generator=generator), Layout(lengths))


def test_a_pack_equals_texts_alone() -> None:
    model, packed = encoder(), texts(1, 6, 3)
    alone = [model(Packed(ids, Layout((len(ids),)))).tokens for ids in packed.unpack()]
    assert_close(model(packed).tokens, torch.cat(alone), rtol=1e-12, atol=1e-13)


def test_the_first_token_sees_the_last_and_order_counts() -> None:
    model, packed = encoder(), texts(5)
    ids = packed.tokens
    other = torch.cat([ids[:-1], (ids[-1:] + 1) % 17])
    first = model(packed).tokens[0]
    assert not torch.allclose(first, model(packed.with_tokens(other)).tokens[0])
    swapped = ids[[0, 2, 1, 3, 4]]
    assert ids[1] != ids[2]
    assert not torch.allclose(first, model(packed.with_tokens(swapped)).tokens[0])


def test_recomputing_changes_no_gradient() -> None:
    model, packed = encoder(), texts(4, 2)
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        found.append(torch.autograd.grad(model(packed).tokens.square().sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="dim=12 is not a multiple of 2 \\* num_heads=8"):
        CONFIG.replace(num_heads=4)
    with pytest.raises(TokenError, match="outside the vocabulary of 17"):
        encoder()(Packed(torch.tensor([3, 17]), Layout((2,))))
    with pytest.raises(LayoutError, match="ids"):
        encoder()(Packed(torch.zeros(2), Layout((2,))))
