"""Samples of unequal size into packs of a budget: all at once, or as they come.

    (tokens, patches) of every sample --pack--> lists of their numbers          first-fit or best-fit, longest first
    one sample after the other --StreamingPacker--> packs that are full         best fit into a bounded number of open rows

A sample is never cut. One that is over the budget alone has a pack of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from vlkit.errors import ConfigError

Cost = tuple[int, int]
"""Tokens and patches of a sample."""
Key = TypeVar("Key")


class Sized(Protocol):
    """A sample that is ready, with what it costs."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_patches(self) -> int: ...


SizedT = TypeVar("SizedT", bound=Sized)


def pack(
    costs: Sequence[Cost],
    *,
    tokens: int | None = None,
    patches: int | None = None,
    items: int | None = None,
    method: Literal["first-fit", "best-fit"] = "first-fit",
) -> list[list[int]]:
    """Divide samples into few packs, none of which exceeds a budget unless it holds one sample alone.

    Samples are placed from the largest to the smallest, by the sum of their parts of the token and the patch budget; equal
    ones in their order. Each goes to the first pack where it fits, or to the one where it leaves the least room. With
    no budget but `items`, neighbours are together.

    Args:
        costs: Of every sample.
        tokens: Of a pack; None for any number.
        patches: Of a pack; None for any number.
        items: Samples of a pack; None for any number.
        method: First-fit or best-fit decreasing.

    Returns:
        Numbers of the samples of every pack, rising; packs in the order of their first samples.

    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms".
    """
    _check_budgets(tokens, patches, items)
    budgets = [(column, limit) for column, limit in enumerate((tokens, patches, items)) if limit is not None]
    if not costs or not budgets:
        return [list(range(len(costs)))] if costs else []
    sizes = np.ones((3, len(costs)), dtype=np.int64)
    sizes[:2] = np.array(costs, dtype=np.int64).T
    needed = sizes[[column for column, _ in budgets]]  # [budgets, samples]
    limits = np.array([limit for _, limit in budgets])
    parts = needed / limits[:, None]
    size = parts[[i for i, (column, _) in enumerate(budgets) if column < 2]].sum(0)
    free = np.empty(
        (len(budgets), len(costs)), dtype=np.int64
    )  # of every pack; a pack over a budget has less than none
    packs: list[list[int]] = []
    for sample in np.argsort(-size, kind="stable"):
        own = needed[:, sample]
        room = free[:, : len(packs)] - own[:, None]
        fits = (room >= 0).all(0)
        if not fits.any():
            free[:, len(packs)] = limits - own
            packs.append([int(sample)])
            continue
        if method == "first-fit":
            chosen = int(fits.argmax())
        else:
            chosen = int(np.where(fits, (room / limits[:, None]).prod(0), np.inf).argmin())
        free[:, chosen] -= own
        packs[chosen].append(int(sample))
    return sorted(sorted(numbers) for numbers in packs)


def pack_items(
    items: Sequence[SizedT], *, tokens: int | None = None, patches: int | None = None, most: int | None = None
) -> list[list[SizedT]]:
    """Items together in forwards of a budget, see `pack`; without one all are together.

    Args:
        tokens: Of a forward of more than one item.
        patches: The same.
        most: Items of a forward.
    """
    costs = [(item.num_tokens, item.num_patches) for item in items]
    return [[items[i] for i in numbers] for numbers in pack(costs, tokens=tokens, patches=patches, items=most)]


def fewest_packs(
    costs: Sequence[Cost], *, tokens: int | None = None, patches: int | None = None, items: int | None = None
) -> int:
    """A lower bound of the number of packs: what the sums need, were samples cut at will; those over a budget go alone."""
    limits = [limit for limit in (tokens, patches, items) if limit is not None]
    sizes = [
        [size for size, limit in zip((*cost, 1), (tokens, patches, items), strict=True) if limit] for cost in costs
    ]
    fitting = [each for each in sizes if all(size <= limit for size, limit in zip(each, limits, strict=True))]
    sums = [sum(column) for column in zip(*fitting, strict=True)]
    bound = max((-(-total // limit) for total, limit in zip(sums, limits, strict=False)), default=0)
    return len(costs) - len(fitting) + max(bound, min(1, len(fitting)))


class Fill(NamedTuple):
    """How full packs are. Sums, so that those of steps and ranks add up.

    Attributes:
        packs: How many.
        samples: In them.
        tokens: In them.
        patches: In them.
        token_budget: Of all of them; 0 without a budget.
        patch_budget: Of all of them; 0 without a budget.
    """

    packs: int = 0
    samples: int = 0
    tokens: int = 0
    patches: int = 0
    token_budget: int = 0
    patch_budget: int = 0

    @classmethod
    def of(cls, packs: Sequence[Sequence[Cost]], *, tokens: int | None = None, patches: int | None = None) -> Fill:
        """The fill of packs, given as the costs of their samples."""
        return cls(
            len(packs),
            sum(len(costs) for costs in packs),
            sum(cost[0] for costs in packs for cost in costs),
            sum(cost[1] for costs in packs for cost in costs),
            len(packs) * (tokens or 0),
            len(packs) * (patches or 0),
        )

    def plus(self, other: Fill) -> Fill:
        return Fill(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def token_fill(self) -> float | None:
        """Tokens over the budget; None without one."""
        return self.tokens / self.token_budget if self.token_budget else None

    @property
    def patch_fill(self) -> float | None:
        """Patches over the budget; None without one."""
        return self.patches / self.patch_budget if self.patch_budget else None


class _Row(Generic[Key]):
    """A pack that is being filled: its samples, what they cost, and how many samples there were before its first."""

    def __init__(self, begun: int) -> None:
        self.keys: list[Key] = []
        self.tokens = self.patches = 0
        self.begun = begun

    def add(self, key: Key, tokens: int, patches: int) -> None:
        self.keys.append(key)
        self.tokens += tokens
        self.patches += patches


class StreamingPacker(Generic[Key]):
    """Fills packs as samples come, with a bounded number of packs open.

    A sample goes into the open row where it fits and leaves the least room, else into a new one. A row without a free token
    is finished; so is the fullest when there are more than `open_rows`, or the oldest if it has waited for more than `patience`
    samples: else what nothing fits beside would wait for ever. One sample over a budget alone is a pack at once.
    Room is the tokens left times the patches left: a row that is full by either has none.

    Args:
        tokens: Of a pack.
        patches: Of a pack; None for any number.
        open_rows: Most packs that wait for more.
        patience: See above.
    """

    def __init__(self, tokens: int, patches: int | None = None, *, open_rows: int = 32, patience: int = 500) -> None:
        _check_budgets(tokens, patches, open_rows)
        self.tokens, self.patches, self.open_rows, self.patience = tokens, patches, open_rows, patience
        self._rows: list[_Row[Key]] = []  # the oldest first
        self._count = 0  # of all samples
        self.fill = Fill()

    def add(self, key: Key, tokens: int, patches: int = 0) -> list[list[Key]]:
        """Place a sample.

        Args:
            key: What stands for it in the packs; JSON, if the state is to be.

        Returns:
            Packs that are finished now: the keys of each in the order in which they came.
        """
        row: _Row[Key]
        self._count += 1
        if tokens > self.tokens or (self.patches is not None and patches > self.patches):
            row = _Row(self._count)
            row.add(key, tokens, patches)
            return [self._finished(row)]
        fitting = [row for row in self._rows if self._room(row, tokens, patches) is not None]
        if fitting:
            row = min(fitting, key=lambda row: self._room(row, tokens, patches) or 0)  # of equal ones the oldest
        else:
            row = _Row(self._count)
            self._rows.append(row)
        row.add(key, tokens, patches)
        if row.tokens == self.tokens:
            return [self._close(row)]
        if len(self._rows) <= self.open_rows:
            return []
        if self._count - self._rows[0].begun > self.patience:
            return [self._close(self._rows[0])]
        return [self._close(min(self._rows, key=lambda row: self._room(row, 0, 0) or 0))]

    def flush(self) -> list[list[Key]]:
        """Finish all open rows, the oldest first."""
        return [self._close(row) for row in list(self._rows)]

    def state_dict(self) -> dict[str, Any]:
        """The open rows, and the fill so far."""
        rows = [
            {"keys": list(row.keys), "tokens": row.tokens, "patches": row.patches, "begun": row.begun}
            for row in self._rows
        ]
        return {
            "budget": [self.tokens, self.patches],
            "rows": rows,
            "samples": self._count,
            "fill": list(self.fill),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: Its rows were filled for another budget.
        """
        if list(state["budget"]) != [self.tokens, self.patches]:
            raise ConfigError(
                f"open packs were filled for {state['budget'][0]} tokens and {state['budget'][1]} patches, and now the budget "
                f"is {self.tokens} and {self.patches}"
            )
        self._rows = []
        for saved in state["rows"]:
            row: _Row[Key] = _Row(saved["begun"])
            row.keys, row.tokens, row.patches = list(saved["keys"]), saved["tokens"], saved["patches"]
            self._rows.append(row)
        self._count = state["samples"]
        self.fill = Fill(*state["fill"])

    def _room(self, row: _Row[Key], tokens: int, patches: int) -> int | None:
        """What is left in a row after a sample: tokens times patches; None where it does not fit."""
        left = self.tokens - row.tokens - tokens
        if self.patches is None:
            return left if left >= 0 else None
        seen = self.patches - row.patches - patches
        return left * seen if left >= 0 and seen >= 0 else None

    def _close(self, row: _Row[Key]) -> list[Key]:
        self._rows.remove(row)
        return self._finished(row)

    def _finished(self, row: _Row[Key]) -> list[Key]:
        own = Fill(1, len(row.keys), row.tokens, row.patches, self.tokens, self.patches or 0)
        self.fill = self.fill.plus(own)
        return row.keys


def _check_budgets(tokens: int | None, patches: int | None, items: int | None) -> None:
    for name, limit in (("tokens", tokens), ("patches", patches), ("samples or rows", items)):
        if limit is not None and limit < 1:
            raise ConfigError(f"a budget of {limit} {name}; expected at least 1")
