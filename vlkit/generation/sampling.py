"""From logits to one id per sequence: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlkit.errors import ConfigError, NonFiniteError


def truncated_probabilities(
    logits: Float[Tensor, "sequences vocab"], *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Float[Tensor, "sequences vocab"]:
    """The distribution that is sampled from, in fp32.

    Args:
        logits: Scores of the next token.
        temperature: Divides the logits; above 0.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least top_p (nucleus sampling).
        top_k: Keep the k most likely tokens first; 0 keeps all. Tokens that tie with the last one kept are kept too.

    Source: nucleus sampling, arXiv:1904.09751.
    """
    # In fp64 and below the highest score: no temperature above 0 overflows, however small.
    scores = ((logits - logits.amax(dim=-1, keepdim=True)).double() / temperature).float()
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all that is likelier
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def sequence_seeds(seed: int, num_sequences: int) -> list[int]:
    """A seed for each sequence of a batch, so that neighbouring seeds share no draws: splitmix64 of the seed, then of its sum
    with the sequence's number. The first n of a larger batch are those of a batch of n.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    return [_splitmix64(_splitmix64(seed) + i) >> 1 for i in range(num_sequences)]


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


class Sampler:
    """Chooses the next id of every sequence.

    Every sequence draws from a generator of its own, so what one sequence gets does not depend on how long its neighbours run.

    Args:
        num_sequences: Sequences in the batch.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: In (0, 1]; see `truncated_probabilities`.
        top_k: 0 for all; see `truncated_probabilities`.
        seed: One number, of which every sequence gets a seed of its own (see `sequence_seeds`), or one number per sequence,
            used as it is.

    Raises:
        ConfigError: A value out of range.
    """

    def __init__(
        self,
        num_sequences: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] = 0,
    ) -> None:
        for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise ConfigError(f"{name} must be a {'whole ' if name == 'top_k' else ''}number, found {value!r}")
        if not temperature >= 0:
            raise ConfigError(f"temperature must be at least 0, found {temperature}")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], found {top_p}")
        if top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0 keeps all), found {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        try:
            seeds = sequence_seeds(seed, num_sequences) if isinstance(seed, int) else [index(each) for each in seed]
        except TypeError:
            raise ConfigError(f"seed must be a whole number, or one per sequence, found {seed!r}") from None
        if len(seeds) != num_sequences:
            raise ConfigError(f"{len(seeds)} seeds for {num_sequences} sequences; give one per sequence, or one number")
        self.generators = [torch.Generator().manual_seed(each % 2**63) for each in seeds]

    def __call__(self, logits: Float[Tensor, "sequences vocab"], sequences: Sequence[int]) -> Int[Tensor, " sequences"]:
        """The next id of each sequence; `sequences` says which sequences of the batch the rows are.

        Raises:
            NonFiniteError: Logits that are NaN.
        """
        best, ids = logits.max(dim=-1)  # NaN counts as the highest
        if bool(best.isnan().any()):
            row = int(best.isnan().nonzero()[0])
            raise NonFiniteError(
                f"sequence {sequences[row]}: the logits are NaN; in fp16 a layer may overflow (try bf16 or fp32), "
                "otherwise look for NaN in the weights or the pixels"
            )
        if self.temperature == 0:
            return ids
        probabilities = truncated_probabilities(
            logits, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
        ).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=self.generators[sequence])
            for row, sequence in zip(probabilities, sequences, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)
