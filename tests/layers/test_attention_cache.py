"""attention() of new tokens to a cache."""

from __future__ import annotations

import pytest
import torch

from tests.layers.attention_cases import WIDTHS, inputs
from vlkit.errors import BackendError
from vlkit.layers.attention import attention
from vlkit.packing import Layout


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((1, 1), (7, 7)),
        ((1, 1, 1), (3, 9, 1)),
        ((1, 1), (5, 2000)),
        ((2, 3), (5, 8)),
        ((4, 4), (4, 4)),
        ((3, 1), (3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("widths", [*WIDTHS, (4, 1, 12, 12)], ids=str)
def test_a_cache_is_read_up_to_its_lengths(
    queries: tuple[int, ...], keys: tuple[int, ...], widths: tuple[int, int, int, int]
) -> None:
    """Rows beyond an item's length are undefined memory, here NaN."""
    heads, kv_heads, head_dim, value_dim = widths
    k = torch.randn(len(keys), max(keys) + 3, kv_heads, head_dim, dtype=torch.float64)
    v = torch.randn(len(keys), max(keys) + 3, kv_heads, value_dim, dtype=torch.float64)
    for item, known in enumerate(keys):
        k[item, known:], v[item, known:] = float("nan"), float("nan")
    q = torch.randn(sum(queries), heads, head_dim, dtype=torch.float64)
    for values in (v, k[..., :value_dim]):
        for causal in (False, True):
            ours = attention(q, k, values, layout=Layout(queries), causal=causal, key_lengths=keys)
            plain = attention(q, k, values, layout=Layout(queries), causal=causal, key_lengths=keys, backend="plain")
            torch.testing.assert_close(ours, plain, atol=1e-13, rtol=1e-13)


def test_queries_are_the_last_positions_of_a_cache() -> None:
    """The last rows of causal attention over everything."""
    q, k, v = (x.detach() for x in inputs((9,), (4, 2, 8, 8)))
    whole = attention(q, k, v, layout=Layout((9,)), causal=True)
    for new in (1, 4, 9):
        ours = attention(q[-new:], k[None], v[None], layout=Layout((new,)), causal=True, key_lengths=[9])
        torch.testing.assert_close(ours, whole[-new:])


def test_an_unknown_backend_is_refused_here_too() -> None:
    q, cache = torch.randn(1, 2, 4), torch.randn(1, 3, 2, 4)
    with pytest.raises(BackendError, match="'eager' is not one of auto, plain"):
        attention(q, cache, cache, layout=Layout((1,)), key_lengths=[2], backend="eager")  # type: ignore[arg-type]
