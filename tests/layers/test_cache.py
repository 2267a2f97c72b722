"""The cache: rows land behind their own sequence, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from vlkit.errors import LayoutError
from vlkit.layers.cache import Cache
from vlkit.packing import Layout


def rows_of(layout: Layout, start: int) -> torch.Tensor:
    """Distinct rows [tokens, 2]."""
    return torch.arange(start, start + 2 * layout.num_tokens, dtype=torch.float32).view(-1, 2)


def test_rows_are_stored_behind_those_of_their_sequence() -> None:
    cache = Cache(2, 3, 8, ((2,), (1, 3)), dtype=torch.float32)
    expected: list[list[torch.Tensor]] = [[], [], []]
    for step, layout in enumerate([Layout((3, 1, 2)), Layout((1, 1, 1)), Layout((2, 4, 1))]):
        first = rows_of(layout, 100 * step)
        second = torch.arange(3 * layout.num_tokens, dtype=torch.float32).view(-1, 1, 3) - 100 * step
        for layer in range(2):
            stored = cache.write(layer, layout, first + layer, second)
        for item, part in enumerate(first.split(layout.lengths)):
            expected[item].append(part)
        assert cache.key_lengths(layout) == [sum(map(len, parts)) for parts in expected]
        cache.advance(layout)
    assert cache.lengths == [6, 6, 4]
    for item, parts in enumerate(expected):
        assert torch.equal(stored[0][item, : cache.lengths[item]], torch.cat(parts) + 1)
    assert stored[1].shape == (3, 8, 1, 3)


def test_writing_happens_in_place() -> None:
    cache = Cache(1, 2, 8, ((2,),), dtype=torch.float32)
    first = cache.write(0, Layout((2, 1)), rows_of(Layout((2, 1)), 0))[0]
    cache.advance(Layout((2, 1)))
    again = cache.write(0, Layout((1, 1)), rows_of(Layout((1, 1)), 50))[0]
    assert again.data_ptr() == first.data_ptr()


def test_a_full_cache_grows_and_keeps_its_rows() -> None:
    cache = Cache(2, 2, 3, ((2,),), dtype=torch.float32)
    layout = Layout((3, 2))
    for layer in range(2):
        cache.write(layer, layout, rows_of(layout, 10 * layer))
    cache.advance(layout)
    small = cache.num_bytes
    one = Layout((1, 1))
    stored = [cache.write(layer, one, rows_of(one, 90 + layer))[0] for layer in range(2)]
    assert cache.capacity == 6
    assert cache.num_bytes == 2 * small == 2 * 2 * 6 * 2 * 4
    for layer in range(2):
        assert torch.equal(
            stored[layer][0, :4], torch.cat([rows_of(layout, 10 * layer)[:3], rows_of(one, 90 + layer)[:1]])
        )
        assert torch.equal(
            stored[layer][1, :3], torch.cat([rows_of(layout, 10 * layer)[3:], rows_of(one, 90 + layer)[1:]])
        )
    long = Layout((20, 1))
    assert cache.write(0, long, rows_of(long, 0))[0].shape[1] == 23


def test_select_keeps_the_sequences_that_go_on() -> None:
    cache = Cache(1, 3, 4, ((2,),), dtype=torch.float32)
    layout = Layout((1, 3, 2))
    cache.write(0, layout, rows_of(layout, 0))
    cache.advance(layout)
    cache.select([2, 1])
    assert cache.lengths == [2, 3]
    one = Layout((1, 1))
    stored = cache.write(0, one, rows_of(one, 70))[0]
    assert torch.equal(stored[0, :3], torch.cat([rows_of(layout, 0)[4:], rows_of(one, 70)[:1]]))
    assert torch.equal(stored[1, :4], torch.cat([rows_of(layout, 0)[1:4], rows_of(one, 70)[1:]]))


def test_it_knows_where_each_sequence_goes_on_and_how_long_its_prompt_was() -> None:
    cache = Cache(1, 3, 4, ((2,),), dtype=torch.float32)
    assert (cache.next_positions, cache.prompt_lengths) == ([0, 0, 0], [0, 0, 0])
    cache.advance(Layout((1, 3, 2)), [7, 3, 2])  # the first sequence was given a high position
    cache.advance(Layout((2, 1, 1)))
    assert (cache.lengths, cache.next_positions, cache.prompt_lengths) == ([3, 4, 3], [9, 4, 3], [1, 3, 2])
    cache.select([2, 0])
    assert (cache.lengths, cache.next_positions, cache.prompt_lengths) == ([3, 3], [3, 9], [2, 1])


def test_another_number_of_sequences_is_refused() -> None:
    cache = Cache(1, 3, 4, ((2,),), dtype=torch.float32)
    with pytest.raises(LayoutError, match=r"3 sequences.*2 items"):
        cache.write(0, Layout((1, 1)), rows_of(Layout((1, 1)), 0))
