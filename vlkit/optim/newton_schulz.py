"""Orthogonalising matrices by matrix products alone: the polar factor of U without a singular value decomposition.

    U = P S Q^T  -> divide by a norm, so that singular values lie in (0, 1]
                 -> x <- a x + b x^3 + c x^5 on every singular value, a few times, with coefficients that drive x to 1
                 -> close to P Q^T

A step is x <- P x with P = a I + b R + c R^2 and R = x x^T. Two forms compute the same polynomials. The standard form
multiplies the n x m matrix at every step. The Gram form takes several steps on the n x n matrices alone, R <- P R P and
Q <- Q P, before x <- Q x; that is less work as soon as m >= 1.5 n.

Source: Muon, Keller Jordan's repository (the quintic iteration and its first coefficients); Polar Express,
arXiv:2505.16932 (coefficients that are optimal step by step); Gram Newton-Schulz, Dao-AILab (the Gram form and its
restarts).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlkit.errors import ConfigError

Triple = tuple[float, float, float]
Norm = Literal["frobenius", "schatten8"]
Form = Literal["auto", "standard", "gram"]

# Bounds on the polynomial: see Polynomial.check.
OVERSHOOT = 1.02  # rounding in bf16 can leave a normalised singular value this far above 1
LARGEST_RESULT = 1.35
MOST_STEPS = 100  # what does not converge in as many never does

EPS = 1e-30  # only keeps 0 / 0 away; 1e-7 would leave gradients smaller than that un-orthogonalised

GRAM_ASPECT = 1.5  # long side / short side from which the Gram form is less work, and safe in bf16
# Short sides below this run as one batched product, larger ones one by one; and the Gram form is not safe in bf16 there.
BATCHED_BELOW = 256
BATCH_BYTES = 2**20  # of one batched product, so that it stays in the caches; more is no faster, less is slower


# ----------------------------------------------------------------------------------------------------------------------
# Coefficients


@lru_cache(maxsize=64)
def polar_coefficients(
    lower: float = 1e-3, steps: int = 5, cushion: float = 0.02, safety: float = 1.02
) -> tuple[Triple, ...]:
    """The quintics that bring [lower, 1] closest to 1, each one optimal after those before it.

    Args:
        lower: Smallest singular value to care about, as a fraction of the norm of the matrix.
        steps: How many quintics.
        cushion: A step does not optimise below this fraction of its upper bound; it trades a little speed on tiny
            values for smaller swings on the others. 0 gives the plain minimax composition.
        safety: Every quintic but the last expects values up to this factor too large, as rounding in bf16 makes them.

    Raises:
        ConfigError: lower outside (0, 1), no steps, a negative cushion, or safety below 1.

    Source: Polar Express, arXiv:2505.16932, algorithm 1 and appendix. The defaults give the table that modded-nanogpt
        and microsoft/dion use; cushion 0.02407327424182761 with safety 1 gives the paper's; cushion 0 gives that of
        CANS.
    """
    if not 0 < lower < 1 or not 1 <= steps <= MOST_STEPS or cushion < 0 or safety < 1:
        raise ConfigError(
            f"polar_coefficients: needs 0 < lower < 1, 1 <= steps <= {MOST_STEPS}, cushion >= 0 and safety >= 1; "
            f"found lower={lower}, steps={steps}, cushion={cushion}, safety={safety}"
        )
    low, high, rows = lower, 1.0, []
    for step in range(steps):
        a, b, c = _best_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # the swing is not symmetric around 1 on the whole interval: make it so
            scale = 2 / (_quintic(a, b, c, low) + _quintic(a, b, c, high))
            a, b, c = a * scale, b * scale, c * scale
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        low = _quintic(a, b, c, low)
        high = 2 - low
        rows.append((a, b, c))
    return tuple(rows)


def _quintic(a: float, b: float, c: float, x: float) -> float:
    return x * (a + x * x * (b + x * x * c))


def _best_quintic(low: float, high: float) -> Triple:
    """The odd quintic closest to 1 on [low, high]: its error takes its largest size four times, with alternating
    sign (Remez).
    """
    if low / high > 1 - 5e-6:  # the interval is a point to rounding; the quintic of the Taylor series is optimal there
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error = math.inf
    while True:
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, new_error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        if abs(new_error - error) < 1e-15:
            return a, b, c
        error = new_error
        root = math.sqrt(9 * b * b - 20 * a * c)  # the extrema of the quintic are where a + 3 b x^2 + 5 c x^4 = 0
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]


@dataclass(frozen=True)
class Polynomial:
    """Quintics a x + b x^3 + c x^5 applied one after the other.

    Attributes:
        rows: (a, b, c) of each step.
        safety: The matrix is divided by this times its norm, so the first value lies in (0, 1 / safety].
        restarts: Steps before which the Gram form computes x anew; None is 2, 4, 6, ...

    R is rounded where x is made anew and no longer fits x then, by a relative error in its small eigenvalues that steps up to
    the next restart amplify. How much of that a table takes, depends on how close to its edges the singular values come
    on the way; so restarts were chosen by trying 250 spectra on all of them.
    """

    rows: tuple[Triple, ...]
    safety: float = 1.0
    restarts: tuple[int, ...] | None = None

    def stages(self, gram: bool) -> list[tuple[int, int]]:
        """First step and end of what is done between two updates of x: single steps in the standard form."""
        steps = len(self.rows)
        inner: Sequence[int] = range(2, steps, 2) if self.restarts is None else self.restarts
        return list(itertools.pairwise([0, *(s for s in (inner if gram else range(1, steps)) if s < steps), steps]))

    def __call__(self, x: Tensor) -> Tensor:
        """The value for singular values x, which are already divided by norm and safety."""
        for a, b, c in self.rows:
            x = x * (a + x * x * (b + x * x * c))
        return x

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a table that can reverse a direction, or that blows up where rounding puts singular values.

        Raises:
            ConfigError: The result is negative somewhere on (0, 1.02], so a dominant direction would come out reversed;
                or it exceeds 1.35 there and dtype has fewer than 24 bits; or it is infinite.
        """
        smallest, largest = _range_of(self)
        if not math.isfinite(largest):
            raise ConfigError(
                f"with these Newton-Schulz coefficients singular values grow without bound in {len(self.rows)} steps, so no "
                f"matrix would come out finite. Coefficients of a step: {self.rows[0]}"
            )
        if not smallest > 0:
            raise ConfigError(
                f"these Newton-Schulz coefficients map a singular value in (0, {OVERSHOOT}] to {smallest:.3g}: "
                f"a gradient with one dominant direction would come out reversed. Coefficients: {self.rows}"
            )
        if not largest <= LARGEST_RESULT and dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"these Newton-Schulz coefficients map a singular value in (0, {OVERSHOOT}] to {largest:.3g}, above "
                f"{LARGEST_RESULT}; rounding in {dtype} reaches such values and the iteration would blow up. "
                f"Use dtype=torch.float32, or coefficients with a safety factor such as 'polar_express'"
            )


@lru_cache(maxsize=64)
def _range_of(polynomial: Polynomial) -> tuple[float, float]:
    linear = torch.linspace(0, OVERSHOOT, 8193, dtype=torch.float64)[1:]
    tiny = torch.logspace(-9, -3, 513, dtype=torch.float64)
    values = polynomial(torch.cat([tiny, linear]) / polynomial.safety)
    return values.min().item(), values.max().item()  # NaN, from infinity minus infinity, fails both comparisons


_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_KELLER = (3.4445, -4.7750, 2.0315)

# name -> (default number of steps, number of steps -> polynomial)
PRESETS: dict[str, tuple[int, Callable[[int], Polynomial]]] = {
    # What the large Muon runs were made with (also torch.optim.Muon). Never converges: values end anywhere in [0.68,
    # 1.13].
    "keller": (5, lambda steps: Polynomial(_repeat_last([_KELLER], steps))),
    # You Jiacheng's row per step.
    "quintic": (5, lambda steps: Polynomial(_repeat_last(_QUINTIC, steps))),
    # The default: closest to the polar factor for five steps, and safe in bf16.
    "polar_express": (
        5,
        lambda steps: Polynomial(polar_coefficients(1e-3, steps), safety=1.02, restarts=(2, 3, 5, 7, 9)),
    ),
    # The two below expect norm="schatten8", which starts the singular values closer to 1. Their larger safety factor
    # is for the Gram form: it makes one restart enough for ps4, the least work of all.
    "ps5": (5, lambda steps: Polynomial(polar_coefficients(2e-3, steps, safety=1.04), 1.02, (2, 3, 5, 7, 9))),
    "ps4": (4, lambda steps: Polynomial(polar_coefficients(5e-3, steps, safety=1.04), 1.02, (2, 4, 5, 7, 9))),
    # Without safety factors: fp32 only.
    "polar_express_raw": (5, lambda steps: Polynomial(polar_coefficients(1e-3, steps, 0.02407327424182761, 1.0))),
    "cans": (5, lambda steps: Polynomial(polar_coefficients(1e-3, steps, 0.0, 1.0))),
    # Eight fast steps, then two that converge to 1.
    "deepseek_v4": (10, lambda steps: Polynomial(_repeat_last([_KELLER] * 8 + [(2.0, -1.5, 0.5)] * 2, steps))),
}


def _repeat_last(rows: Sequence[Triple], steps: int) -> tuple[Triple, ...]:
    return (*rows[:steps], *[rows[-1]] * (steps - len(rows)))


def resolve_polynomial(ns: str | Triple | Sequence[Triple], steps: int | None = None) -> Polynomial:
    """The polynomial behind a preset name, one (a, b, c) for all steps, or a list of them (the last repeats).

    Raises:
        ConfigError: An unknown name, fewer than one step, or coefficients of another form.
    """
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"Newton-Schulz takes 1 to {MOST_STEPS} steps, found steps={steps}; 5 are usual")
    if isinstance(ns, str):
        if ns not in PRESETS:
            raise ConfigError(f"unknown Newton-Schulz preset {ns!r}; there are {', '.join(PRESETS)}")
        default, make = PRESETS[ns]
        return make(default if steps is None else steps)
    rows = [ns] if ns and not isinstance(ns[0], Sequence) else list(ns)
    if not rows or any(not isinstance(row, Sequence) or len(row) != 3 for row in rows):
        raise ConfigError(
            f"Newton-Schulz coefficients are a preset name, (a, b, c), or a list of (a, b, c); found {ns!r}"
        )
    try:
        triples = [(float(row[0]), float(row[1]), float(row[2])) for row in rows]  # type: ignore[index]
    except (TypeError, ValueError):
        raise ConfigError(f"Newton-Schulz coefficients are numbers, found {ns!r}") from None
    if len(triples) > MOST_STEPS:
        raise ConfigError(f"Newton-Schulz takes 1 to {MOST_STEPS} steps, found {len(triples)} rows of coefficients")
    default = 5 if len(triples) == 1 else len(triples)
    chosen = _repeat_last(triples, default if steps is None else steps)
    # Of a table as steep as Polar Express nothing is known; it takes single steps.
    steep = any(a > 5 for a, _, _ in chosen)
    return Polynomial(chosen, restarts=tuple(range(1, len(chosen))) if steep else None)


# ----------------------------------------------------------------------------------------------------------------------
# The iteration


@dataclass(frozen=True)
class NewtonSchulz:
    """How to orthogonalise: coefficients, normalisation, number format, form.

    The result for a matrix depends on that matrix alone, bit for bit on the CPU: not on what else is in its batch, nor
    on whether it came transposed. What is chosen here, is chosen from its shape.

    Attributes:
        polynomial: The quintics.
        norm: "frobenius", or "schatten8": an upper bound of the spectral norm that is 5 to 10 times smaller on flat
            spectra and comes free with the first step. It is one factor per matrix, so the polar factor stays the same.
        dtype: Of the products. "auto" is bf16 on GPUs and on CPUs with bf16 instructions, else fp32.
        form: "auto" takes the Gram form where it is less work.
    """

    polynomial: Polynomial
    norm: Norm = "frobenius"
    dtype: torch.dtype | Literal["auto"] = "auto"
    form: Form = "auto"

    def __post_init__(self) -> None:
        if self.norm not in ("frobenius", "schatten8"):
            raise ConfigError(f"norm is 'frobenius' or 'schatten8', found {self.norm!r}")
        if self.form not in ("auto", "standard", "gram"):
            raise ConfigError(f"form is 'auto', 'standard' or 'gram', found {self.form!r}")
        if self.dtype not in ("auto", torch.bfloat16, torch.float32, torch.float64):
            raise ConfigError(f"dtype is 'auto', torch.bfloat16, torch.float32 or torch.float64, found {self.dtype!r}")
        if self.dtype == "auto":
            self.polynomial.check(torch.float64)
        else:
            self.polynomial.check(self.dtype)

    @classmethod
    def make(
        cls,
        ns: str | Triple | Sequence[Triple] = "polar_express",
        steps: int | None = None,
        norm: Norm = "frobenius",
        dtype: torch.dtype | Literal["auto"] = "auto",
        form: Form = "auto",
    ) -> NewtonSchulz:
        """From the options that users write."""
        return cls(resolve_polynomial(ns, steps), norm, dtype, form)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The number format of the products on a device."""
        if self.dtype != "auto":
            return self.dtype
        dtype = torch.bfloat16 if device.type != "cpu" or _cpu_has_bf16() else torch.float32
        self.polynomial.check(dtype)
        return dtype

    def uses_gram(self, rows: int, cols: int, dtype: torch.dtype) -> bool:
        """Whether matrices of this shape take the Gram form.

        Raises:
            ConfigError: It was asked for by name where bf16 would make it diverge.
        """
        short, long = sorted((rows, cols))
        suits = short >= BATCHED_BELOW and long >= GRAM_ASPECT * short
        if self.form == "gram" and not suits and dtype == torch.bfloat16:
            raise ConfigError(
                f"form='gram' can diverge in bf16 on small or near-square matrices ({rows}x{cols}): it needs at least "
                f"{BATCHED_BELOW} rows and {GRAM_ASPECT} times as many columns, or the other way round; "
                f"use form='auto' or dtype=torch.float32"
            )
        return suits if self.form == "auto" else self.form == "gram"

    def __call__(self, x: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch rows cols"]:
        """The orthogonalised matrices, in the number format of the products."""
        *batch, rows, cols = x.shape
        dtype = self.compute_dtype(x.device)
        gram = self.uses_gram(rows, cols, dtype)
        if x.numel() == 0:
            return x.to(dtype)
        # Cast, then lay out wide, then take the norm: so the result is a function of the cast values only.
        wide = x.to(dtype).reshape(-1, rows, cols)
        if rows <= cols:
            result = self._run_wide(wide.contiguous(), gram)
        else:
            result = _transposed(self._run_wide(_transposed(wide), gram))
        return result.view(*batch, rows, cols)

    def _run_wide(self, x: Tensor, gram: bool) -> Tensor:
        _, rows, cols = x.shape
        if rows >= BATCHED_BELOW:
            if len(x) == 1:
                return self._run(x[0], gram)[None]
            return torch.stack([self._run(matrix, gram) for matrix in x])
        if x.device.type == "cpu" and x.dtype != torch.bfloat16 and (rows % 4 or cols % 4):
            # Products of fp32 round differently for matrices that do not begin at a multiple of 64 bytes, so a result
            # would depend on the place in the batch. Zeros change nothing else.
            padded = torch.nn.functional.pad(x, (0, -cols % 4, 0, -rows % 4))
            return self._run_wide(padded, gram)[:, :rows, :cols].contiguous()
        size = max(1, BATCH_BYTES // (rows * cols * x.element_size()))
        if len(x) <= size:
            return self._run(x, gram)
        return torch.cat([self._run(chunk, gram) for chunk in x.split(size)])

    def _run(self, x: Tensor, gram: bool) -> Tensor:
        """Products on [rows, cols] or [batch, rows, cols] with rows <= cols, contiguous."""
        scale = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=x.ndim == 3, dtype=torch.float64)
        x = _divide(x, scale * self.polynomial.safety + EPS)
        return _iterate(x, self.polynomial, gram, self.norm == "schatten8")


def orthogonalize(
    x: Float[Tensor, "*batch rows cols"],
    *,
    ns: str | Triple | Sequence[Triple] = "polar_express",
    steps: int | None = None,
    norm: Norm = "frobenius",
    dtype: torch.dtype | Literal["auto"] = "auto",
    form: Form = "auto",
) -> Float[Tensor, "*batch rows cols"]:
    """Replace the singular values of every matrix by values near 1. Zero stays exactly zero.

    How near is the preset's matter: after five steps of "polar_express" the values that were above a thousandth of the
    norm lie in [0.85, 1.14], those of "keller" in [0.47, 1.20]. In bf16 the rounding noise of a rank-deficient matrix
    is full rank and gets amplified too, by up to the slope of the polynomial at zero; in fp32 it does not show.

    Args:
        x: One matrix or a batch of any number of axes.
        ns: A preset ("polar_express", "keller", "quintic", "ps5", "ps4", "polar_express_raw", "cans", "deepseek_v4"),
            (a, b, c), or a list of (a, b, c).
        steps: Number of quintics; None is the preset's own.
        norm: "frobenius" or "schatten8", see NewtonSchulz.
        dtype: Of the products; "auto" is bf16 where the hardware has it.
        form: "auto", "standard" or "gram".

    Returns:
        Matrices of the dtype of x.

    Raises:
        ConfigError: Unknown options, fewer than two axes, or coefficients that do not suit the dtype.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ConfigError(f"orthogonalize needs real matrices [..., rows, cols], found {x.dtype} {tuple(x.shape)}")
    with torch.no_grad():
        return NewtonSchulz.make(ns, steps, norm, dtype, form)(x).to(x.dtype)


def _iterate(x: Tensor, polynomial: Polynomial, gram: bool, schatten: bool) -> Tensor:
    """All steps on [rows, cols] or [batch, rows, cols] whose singular values are at most 1."""
    for start, stop in polynomial.stages(gram):
        r = _symmetric(x, x.mT)
        q, g2 = None, None
        for step in range(start, stop):
            a, b, c = polynomial.rows[step]
            if step == 0 and schatten:
                p, g2 = _schatten_start(r, a, b, c)
            else:
                # Without the fifth power no square is needed; and torch.baddbmm with alpha=0 takes beta for 1, in bf16 on CPUs.
                p = _symmetric(r, r, add=r, beta=b, alpha=c) if c else r * b
                p.diagonal(dim1=-2, dim2=-1).add_(a)
            if step < stop - 1:
                r = _symmetric(p, _symmetric(r, p))
                r = r if g2 is None or step else _divide(r, g2)
            q = p if q is None else _symmetric(q, p)
        assert q is not None
        x = (q if g2 is None else _divide(q, g2.sqrt())) @ x
    return x


def _schatten_start(r: Tensor, a: float, b: float, c: float) -> tuple[Tensor, Tensor]:
    """P of the first step and g^2, where g is 1.02 times the Schatten-8 norm of x, and R = x x^T.

    The Schatten-8 norm, (sum of s^8)^(1/8) = ||R^2||_F^(1/4), bounds the largest singular value s. P = a I + b R + c R^2 is
    that of x / g; x and R stay as they are, since rounding them again would cost more precision than all else.
    P is put together in separate operations of fp32: a fused one rounds the last elements of a row of vector registers
    differently in bf16, so that a result would depend on its place in the batch.
    """
    square = _symmetric(r, r)
    norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=r.ndim == 3, dtype=torch.float64)
    g2 = OVERSHOOT**2 * norm.clamp_min(EPS).sqrt()
    wide = torch.promote_types(r.dtype, torch.float32)
    p = r.to(wide).mul((b / g2).to(wide)).add_(square.to(wide).mul_((c / g2**2).to(wide)))
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p.to(r.dtype), g2


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, computed in fp32 and rounded once; scale is fp64, a scalar or one value per matrix."""
    if x.dtype == torch.float64 or x.ndim == 2:  # a 0-dim divisor takes part in full precision
        return x / scale
    return (x.float() / scale.float()).to(x.dtype)  # three fast passes; one pass of mixed dtypes takes longer on CPUs


def _addmm(add: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    return (torch.addmm if add.ndim == 2 else torch.baddbmm)(add, a, b, beta=beta, alpha=alpha)


def _symmetric(a: Tensor, b: Tensor, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """alpha * a b + beta * add, for arguments whose result is symmetric.

    On CPUs a large result is computed in panels of rows that stop at the diagonal, and mirrored: 5/8 of the work with
    four panels.
    """
    size = a.shape[-2]
    panels = 1 if a.ndim == 3 or a.device.type != "cpu" else 4 if size >= 512 else 2 if size >= 256 else 1
    if panels == 1:
        return torch.matmul(a, b) if add is None else _addmm(add, a, b, beta=beta, alpha=alpha)
    out = a.new_empty(size, size)
    bounds = [size * i // panels for i in range(panels + 1)]
    for lo, hi in itertools.pairwise(bounds):
        if add is None:
            torch.mm(a[lo:hi], b[:, :hi], out=out[lo:hi, :hi])
        else:
            torch.addmm(add[lo:hi, :hi], a[lo:hi], b[:, :hi], beta=beta, alpha=alpha, out=out[lo:hi, :hi])
        out[:lo, lo:hi] = out[lo:hi, :lo].mT
    return out


def _transposed(x: Tensor) -> Tensor:
    """[batch, rows, cols] -> contiguous [batch, cols, rows]; matrix by matrix where they are large, which is the
    fast path of copy.
    """
    if len(x) == 1 or x.device.type != "cpu" or min(x.shape[1:]) < BATCHED_BELOW:
        return x.mT.contiguous() if len(x) > 1 else x[0].mT.contiguous()[None]
    return torch.stack([matrix.mT.contiguous() for matrix in x])


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    """Whether bf16 products run on instructions of their own, rather than being emulated (which is slower than
    fp32).
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
