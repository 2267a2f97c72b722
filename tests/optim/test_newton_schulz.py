"""Against singular value decompositions in fp64, and against the polynomials evaluated on singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlkit.errors import ConfigError
from vlkit.optim import orthogonalize, polar_coefficients
from vlkit.optim.newton_schulz import PRESETS, NewtonSchulz, Polynomial, resolve_polynomial

BF16_PRESETS = [name for name in PRESETS if name not in ("polar_express_raw", "cans")]


def norm_for(preset: str) -> str:
    return "schatten8" if preset in ("ps4", "ps5") else "frobenius"


def random_matrix(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """fp64 matrices like those that training produces."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    return {
        "gaussian": lambda: gaussian,
        "1/i": lambda: u / torch.arange(1, len(vh) + 1) @ vh,
        "rank 16 and noise": lambda: u[:, :16] @ vh[:16] + 1e-2 * gaussian / len(vh) ** 0.5,
        "a quarter ones": lambda: u * torch.where(torch.arange(len(vh)) < len(vh) // 4, 1.0, 0.03) @ vh,
        "spike": lambda: 10 * u[:, :1] @ vh[:1] + gaussian / len(vh) ** 0.5,
        "rank 1": lambda: u[:, :1] @ vh[:1],
        "orthogonal": lambda: u @ vh,
    }[kind]()


def exact(matrix: Tensor, preset: str, steps: int | None = None) -> Tensor:
    """The preset's polynomial on the singular values, in fp64."""
    polynomial = resolve_polynomial(preset, steps)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm() / polynomial.safety
    if norm_for(preset) == "schatten8":
        s = s / (1.02 * s.pow(8).sum() ** 0.125)
    return u * polynomial(s) @ vh


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# Coefficients


def test_generator_gives_the_table_of_modded_nanogpt() -> None:
    table = [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]
    assert_close(torch.tensor(polar_coefficients()), torch.tensor(table), rtol=0, atol=1e-12)


def test_generator_gives_the_tables_of_the_papers() -> None:
    polar_express = polar_coefficients(1e-3, 8, 0.02407327424182761, 1.0)
    assert polar_express[0] == pytest.approx((8.287212018145630, -23.59588651909884, 17.30038731253093), abs=1e-12)
    assert polar_express[5] == pytest.approx((1.891301407787, -1.267995827195, 0.376804089485), abs=1e-9)
    assert polar_express[7] == pytest.approx((15 / 8, -10 / 8, 3 / 8), abs=1e-5)
    cans = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
    ]
    assert_close(torch.tensor(polar_coefficients(1e-3, 5, 0.0, 1.0)[:4]), torch.tensor(cans), rtol=0, atol=5.1e-5)


def test_presets_for_schatten8_are_as_published_here() -> None:
    """The numbers that the figures in docs/optim.md were measured with."""
    assert resolve_polynomial("ps4").rows[3] == pytest.approx(
        (2.2699256415391247, -1.6411963542199395, 0.4158177116189476), abs=1e-12
    )
    assert resolve_polynomial("ps5").rows[4] == pytest.approx(
        (2.060733898134092, -1.4437727932323854, 0.39484517267021635), abs=1e-12
    )


def test_more_steps_of_polar_express_reoptimise_the_last() -> None:
    """Not the fifth row again: six steps end within 0.4 % of 1."""
    x = torch.linspace(1e-3, 1, 999, dtype=torch.float64)
    values = resolve_polynomial("polar_express", 6)(x / 1.02)
    assert 0.995 < values.min() < values.max() < 1.003


def test_coefficients_that_reverse_a_direction_are_refused() -> None:
    """The table that Turbo-Muon uses is negative at 1: a rank-1 gradient would come out with the wrong sign."""
    turbo = [(4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169)]
    with pytest.raises(ConfigError, match="reversed"):
        orthogonalize(torch.eye(3), ns=turbo)


@pytest.mark.parametrize("preset", ["polar_express_raw", "cans"])
def test_coefficients_without_safety_are_refused_in_bf16(preset: str) -> None:
    with pytest.raises(ConfigError, match="blow up"):
        orthogonalize(torch.eye(3), ns=preset, dtype=torch.bfloat16)
    orthogonalize(torch.eye(3), ns=preset, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ns": "kellar"}, "keller"),
        ({"ns": [(1.0, 2.0)]}, "list of"),
        ({"ns": []}, "list of"),
        ({"steps": 0}, "takes 1 to 100 steps, found steps=0"),
        ({"steps": 1_000_000}, "found steps=1000000"),
        ({"ns": [(2.0, -1.5, 0.5)] * 101}, "found 101 rows"),
        ({"ns": [("a", "b", "c")]}, "coefficients are numbers"),
        ({"ns": (1.0, 2.0, 3.0), "dtype": torch.float32}, "grow without bound in 5 steps"),
        ({"norm": "spectral"}, "schatten8"),
        ({"form": "fast"}, "gram"),
        ({"dtype": torch.float16}, "bfloat16"),
        ({"form": "gram", "dtype": torch.bfloat16}, "3x3"),  # test_gram_spectra.py has what would happen
    ],
)
def test_unknown_options_are_refused_with_what_there_is(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        orthogonalize(torch.eye(3), **options)  # type: ignore[arg-type]


def test_a_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(5,\)"):
        orthogonalize(torch.ones(5))


@pytest.mark.parametrize("bad", [{"lower": 0.0}, {"lower": 1.0}, {"steps": 0}, {"cushion": -0.1}, {"safety": 0.9}])
def test_generator_refuses_what_has_no_solution(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="polar_coefficients"):
        polar_coefficients(**bad)  # type: ignore[arg-type]


def test_coefficients_can_be_written_out() -> None:
    keller = (3.4445, -4.7750, 2.0315)
    x = random_matrix("gaussian", 7, 9).float()
    by_name = orthogonalize(x, ns="keller", dtype=torch.float32)
    assert torch.equal(by_name, orthogonalize(x, ns=keller, dtype=torch.float32))
    assert torch.equal(by_name, orthogonalize(x, ns=[keller], steps=5, dtype=torch.float32))
    assert not torch.equal(by_name, orthogonalize(x, ns=[keller, keller], dtype=torch.float32))


# Accuracy

# Cosine with the exact polar factor in fp32, of the 256 x 640 matrices here; rounding in bf16 may cost 0.01 more.
LEAST_COSINE = {
    "gaussian": {
        "keller": 0.985,
        "quintic": 0.999,
        "polar_express": 0.995,
        "ps5": 0.999,
        "ps4": 0.997,
        "deepseek_v4": 0.999,
    },
    "1/i": {
        "keller": 0.982,
        "quintic": 0.996,
        "polar_express": 0.994,
        "ps5": 0.998,
        "ps4": 0.993,
        "deepseek_v4": 0.999,
    },
    "rank 16 and noise": {
        "keller": 0.986,
        "quintic": 0.992,
        "polar_express": 0.994,
        "ps5": 0.998,
        "ps4": 0.995,
        "deepseek_v4": 0.999,
    },
}


@pytest.mark.parametrize("preset", BF16_PRESETS)
@pytest.mark.parametrize("kind", LEAST_COSINE)
def test_result_points_where_the_polar_factor_points(preset: str, kind: str) -> None:
    matrix = random_matrix(kind, 256, 640)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    for dtype, slack in ((torch.float32, 0.0), (torch.bfloat16, 0.01)):
        for form in ("standard", "gram"):
            result = orthogonalize(matrix.float(), ns=preset, norm=norm_for(preset), dtype=dtype, form=form)
            assert cosine(result, u @ vh) >= LEAST_COSINE[kind][preset] - slack, (dtype, form)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(33, 50), (130, 260), (280, 270), (259, 777)])
def test_fp32_result_is_the_polynomial_of_the_singular_values(preset: str, shape: tuple[int, int]) -> None:
    """Every size class: one batched product, two panels; both forms. Largest seen: 2e-6 standard, 7e-3 Gram."""
    matrix = random_matrix("1/i", *shape)
    expected = exact(matrix, preset)
    for form, tolerance in (("standard", 1e-5), ("gram", 1e-2 if shape == (280, 270) else 2e-4)):
        result = orthogonalize(matrix.float(), ns=preset, norm=norm_for(preset), dtype=torch.float32, form=form)
        assert (result - expected).norm() < tolerance * expected.norm(), form


@pytest.mark.parametrize("shape", [(37, 41), (300, 310), (770, 800)])
def test_fp64_result_is_the_polynomial_to_rounding(shape: tuple[int, int]) -> None:
    """Panels of every count, and a size that no panel count divides."""
    matrix = random_matrix("gaussian", *shape)
    expected = exact(matrix, "polar_express")
    for form in ("standard", "gram"):
        result = orthogonalize(matrix, dtype=torch.float64, form=form)
        assert (result - expected).norm() < 1e-10 * expected.norm(), form


@pytest.mark.parametrize("preset", BF16_PRESETS)
def test_bf16_stays_bounded(preset: str) -> None:
    """1.24 is the largest seen; in exact arithmetic 1.20. The Gram form is in test_gram_spectra.py."""
    for kind in ("gaussian", "1/i", "spike", "rank 16 and noise", "a quarter ones"):
        for shape in ((256, 256), (640, 256), (64, 200)):
            matrix = random_matrix(kind, *shape).float()
            result = orthogonalize(matrix, ns=preset, norm=norm_for(preset), dtype=torch.bfloat16)
            assert torch.linalg.matrix_norm(result, 2) < 1.3, (kind, shape)


@pytest.mark.parametrize("preset", BF16_PRESETS)
@pytest.mark.parametrize("kind", ["rank 1", "orthogonal", "spike"])
def test_no_direction_is_reversed(preset: str, kind: str) -> None:
    matrix = random_matrix(kind, 40, 48)
    result = orthogonalize(matrix.float(), ns=preset, norm=norm_for(preset), dtype=torch.bfloat16)
    assert (matrix * result).sum() > 0.6 * torch.linalg.matrix_norm(matrix, "nuc")


# Invariances


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["frobenius", "schatten8"])
def test_scale_does_not_matter(dtype: torch.dtype, norm: str) -> None:
    """Down to gradients of 1e-18, which an eps of 1e-7 would leave as they are, and up to squares beyond fp32."""
    matrix = random_matrix("gaussian", 24, 56).float()
    expected = orthogonalize(matrix, dtype=dtype, norm=norm)
    for exponent in (-60, -20, 20, 60):  # powers of two: bit for bit
        assert torch.equal(orthogonalize(matrix * 2.0**exponent, dtype=dtype, norm=norm), expected)


@pytest.mark.parametrize("norm", ["frobenius", "schatten8"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 9, 4), (260, 600)])
def test_zero_stays_exactly_zero(norm: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not orthogonalize(torch.zeros(shape), dtype=dtype, norm=norm).any()


@pytest.mark.parametrize("shape", [(24, 56), (96, 120), (260, 300), (256, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposing_commutes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random_matrix("gaussian", *shape).float()
    assert torch.equal(orthogonalize(matrix.mT.contiguous(), dtype=dtype), orthogonalize(matrix, dtype=dtype).mT)
    assert torch.equal(orthogonalize(matrix.mT, dtype=dtype), orthogonalize(matrix, dtype=dtype).mT)


@pytest.mark.parametrize("shape", [(48, 40), (30, 90), (260, 270)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["frobenius", "schatten8"])
def test_a_matrix_does_not_depend_on_its_batch(shape: tuple[int, int], dtype: torch.dtype, norm: str) -> None:
    """Among matrices a million times larger and smaller, and one of zeros."""
    batch = torch.stack([random_matrix("gaussian", *shape, seed=seed).float() for seed in range(5)])
    batch = batch * torch.tensor([1.0, 1e6, 1e-6, 0.0, 1.0])[:, None, None]
    together = orthogonalize(batch, dtype=dtype, norm=norm)
    for i, matrix in enumerate(batch):
        assert torch.equal(together[i], orthogonalize(matrix, dtype=dtype, norm=norm))


def test_long_batches_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(3, 4, 9, 5, generator=torch.Generator().manual_seed(0))
    whole = orthogonalize(batch, dtype=torch.float32)
    monkeypatch.setattr("vlkit.optim.newton_schulz.BATCH_BYTES", 9 * 5 * 4 * 5)  # five at once
    assert torch.equal(orthogonalize(batch, dtype=torch.float32), whole)
    assert whole.shape == batch.shape


def test_input_is_left_alone_and_its_dtype_comes_back() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        matrix = random_matrix("gaussian", 6, 11).to(dtype)
        before = matrix.clone()
        for compute in (torch.float32, torch.bfloat16):
            assert orthogonalize(matrix, dtype=compute).dtype == dtype
        assert torch.equal(matrix, before)


def test_no_matrices_give_no_matrices() -> None:
    assert orthogonalize(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert orthogonalize(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def test_gram_form_is_chosen_where_it_is_less_work() -> None:
    auto = NewtonSchulz.make(dtype=torch.bfloat16)
    assert auto.uses_gram(256, 384, torch.bfloat16)
    assert not auto.uses_gram(256, 383, torch.bfloat16)
    assert auto.uses_gram(2560, 256, torch.bfloat16)
    assert not auto.uses_gram(2560, 255, torch.bfloat16)


def test_steep_coefficients_written_out_take_single_steps() -> None:
    """A long list like Polar Express's own is not known to survive two steps in bf16 without a new R."""
    keller = (3.4445, -4.7750, 2.0315)
    assert resolve_polynomial([keller], 5).stages(gram=True) == [(0, 2), (2, 4), (4, 5)]
    assert resolve_polynomial([keller], 5).stages(gram=False) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert resolve_polynomial(polar_coefficients(1e-3, 3)).stages(gram=True) == [(0, 1), (1, 2), (2, 3)]


def test_polynomial_is_a_composition() -> None:
    square_root = torch.tensor([0.5], dtype=torch.float64)
    assert Polynomial(((2.0, 0.0, 0.0), (1.0, 1.0, 0.0)))(square_root).item() == 2.0  # 1 + 1^3
