"""Streams in shares of the tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vlkit.errors import ConfigError
from vlkit.training.mixture import Mixture
from vlkit.training.order import order


def drawn(
    mixture: Mixture, lengths: list[Any], total: int, progress: Any = lambda tokens: 0.0
) -> list[tuple[int, int]]:
    """Draw until there are `total` tokens; sample i of stream s has lengths[s][i] of them."""
    found, tokens = [], 0
    while tokens < total:
        draw = mixture.next(progress(tokens))
        length = int(lengths[draw.stream][draw.index])
        mixture.told(draw, length)
        found.append((draw.stream, draw.index))
        tokens += length
    return found


def streams(seed: int = 0) -> list[Any]:
    """Short ones of about 300 tokens, long ones of about 9,000."""
    rng = np.random.default_rng(seed)
    return [
        rng.lognormal(5.5, 0.6, 997).astype(int) + 1,
        rng.lognormal(9.0, 0.4, 101).astype(int).clip(1, 32768),
        rng.lognormal(6.0, 1.0, 499).astype(int) + 1,
    ]


@pytest.mark.parametrize("shares", [[0.75, 0.25], [3.0, 1.0], [0.5, 0.5], [0.25, 0.25, 0.5]])
def test_shares_of_tokens_are_within_half_a_percent(shares: list[float]) -> None:
    """10^6 tokens; a quarter of them is 2 % of the samples when those are thirty times as long."""
    lengths = streams()[: len(shares)]
    mixture = Mixture([len(each) for each in lengths], shares, seed=1)
    found = drawn(mixture, lengths, 10**6)
    total = sum(mixture.tokens)
    for stream, share in enumerate(shares):
        assert abs(mixture.tokens[stream] / total - share / sum(shares)) < 0.005
    samples = [sum(stream == one for one, _ in found) for stream in range(len(shares))]
    assert samples[1] < samples[0] / 5, "shares are of tokens: the long stream gives few samples"


def test_a_share_that_rises_is_met_all_along() -> None:
    """Text alone at first, then straight up to 40 % of the other stream at half of the stage."""
    lengths, total = streams()[:2], 2_000_000
    mixture = Mixture([997, 101], [1.0, [(0.1, 0.0), (0.5, 2 / 3)]], seed=0)
    assert mixture.shares(0.05) == [1.0, 0.0]
    assert mixture.shares(0.3) == pytest.approx([0.75, 0.25])
    assert mixture.shares(0.9) == pytest.approx([0.6, 0.4])
    for end in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        begin = sum(mixture.tokens) / total
        drawn(mixture, lengths, int((end - begin) * total), lambda tokens, begin=begin: begin + tokens / total)
        reached = sum(mixture.tokens) / total
        share = np.mean([mixture.shares(place)[1] for place in np.linspace(0, reached, 2001)])
        assert abs(mixture.tokens[1] - share * reached * total) < max(lengths[1])
        assert end > 0.1 or mixture.tokens[1] == 0


def test_a_stream_without_a_share_now_is_not_drawn_whatever_it_lacks() -> None:
    mixture = Mixture([5, 5], [1.0, [(0.5, 1.0), (0.6, 0.0)]])
    mixture.told(mixture.next(0.0), 1000)
    assert [mixture.next(0.6).stream for _ in range(3)] == [0, 0, 0]
    assert mixture.next(0.5).stream == 1


def test_a_stream_of_which_nothing_can_be_used_does_not_starve_the_others() -> None:
    """Both halves of the draws go on from a saved place."""
    mixture = Mixture([3, 5], seed=0)
    for part in range(2):
        other = Mixture([3, 5], seed=0)
        other.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
        mixture, before = other, mixture.tokens[1]
        streams = []
        for _ in range(50):
            draw = mixture.next(0.0)
            mixture.told(draw, 10 * draw.stream)
            streams.append(draw.stream)
        assert mixture.tokens[1] - before == 10 * sum(streams) >= 200
        assert streams == [0] * 8 + [1, 0] * 21 if part == 0 else streams == [1, 0] * 25


def test_a_stream_of_which_half_cannot_be_used_has_its_share() -> None:
    lengths = streams()[:2]
    lengths[1][::2] = 0
    mixture = Mixture([997, 101], [0.5, 0.5], seed=3)
    drawn(mixture, lengths, 10**6)
    assert abs(mixture.tokens[1] / sum(mixture.tokens) - 0.5) < 0.005


def test_one_stream_is_its_own_order_and_needs_no_tokens() -> None:
    mixture = Mixture([13], seed=5)
    assert not mixture.needs_tokens
    assert [mixture.next(0.0).index for _ in range(40)] == order(13, range(40), seed=5)


def test_a_saved_place_goes_on_with_the_same_draws() -> None:
    lengths = streams()
    sizes = [len(each) for each in lengths]
    whole, part = (Mixture(sizes, [0.2, 0.3, 0.5], seed=2) for _ in range(2))
    drawn(part, lengths, 200_000)
    drawn(whole, lengths, 200_000)
    other = Mixture(sizes, [0.2, 0.3, 0.5], seed=2)
    other.load_state_dict(json.loads(json.dumps(part.state_dict())))
    part.next(0.0)  # what is drawn after a state was taken does not change it
    assert drawn(other, lengths, 300_000) == drawn(whole, lengths, 300_000)


@pytest.mark.parametrize(
    ("sizes", "shares", "message"),
    [
        ([], None, "at least one stream"),
        ([3, 0], None, "stream 1 has no samples"),
        ([3, 3], [1.0], "1 shares for 2 streams"),
        ([3, 3], [1.0, -0.5], "share of stream 1: expected numbers of at least 0"),
        ([3, 3], [1.0, float("nan")], "share of stream 1: expected numbers of at least 0"),
        ([3, 3], [1.0, "half"], "share of stream 1: expected a number or points"),
        ([3, 3], [1.0, [(0.5, 1), (0.2, 1)]], "share of stream 1: progress rises"),
        ([3, 3], [1.0, [(0, 1), (20, 1)]], "share of stream 1: progress rises"),
        ([3, 3], [[(0, 1), (0.5, 0)], 0.0], "at progress 0.5 the shares of all streams are 0"),
    ],
)
def test_shares_that_mean_nothing_are_refused(sizes: list[int], shares: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(sizes, shares)


def test_a_place_of_other_streams_is_refused() -> None:
    with pytest.raises(ConfigError, match="of 2 streams, the data has 3"):
        Mixture([3, 3, 3]).load_state_dict(Mixture([3, 3]).state_dict())
