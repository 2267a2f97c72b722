"""Whole Qwen2-VL, Qwen2.5-VL and Qwen3-VL models filled by a formula, against numbers made by transformers 5.23 in fp32.

A second implementation, which shares no code with either, gave the same numbers to 6e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import vlkit
from tests.golden import check, fill, sequence
from vlkit.llm.qwen2 import Qwen2Config
from vlkit.llm.qwen3 import Qwen3Config
from vlkit.models import VisionLanguageModel, VLMConfig, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_common
from vlkit.packing import Batch
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViTConfig

IMAGE, VIDEO, START, END = 192, 193, 190, 191
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_marks": (START, END)}
QWEN2 = Qwen2Config(
    vocab_size=200, dim=48, num_layers=2, num_heads=3, num_kv_heads=1, mlp_dim=96, rope_sections=(2, 3, 3),
    max_positions=512, tied=False,
)  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=200, dim=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96, theta=5000000.0,
    rope_sections=(4, 2, 2), rope_interleaved=True, max_positions=512, tied=False,
)  # fmt: skip
QWEN3_TOWER = Qwen3ViTConfig(dim=64, num_layers=4, num_heads=2, mlp_dim=80, position_grid=(6, 6), taps=(0, 1, 2))
CONFIGS = {
    "qwen2-vl": qwen_common.composed(
        "qwen2-vl", Qwen2ViTConfig(dim=64, num_layers=2, num_heads=2, mlp_dim=128), QWEN2, TOKENS
    ),
    "qwen2.5-vl": qwen_common.composed(
        "qwen2.5-vl",
        Qwen25ViTConfig(dim=64, num_layers=4, num_heads=2, mlp_dim=80, window_size=56, full_layers=(1, 3)),
        QWEN2,
        TOKENS,
        norm="rms",
        ticks_per_second=2.0,
    ),
    "qwen3-vl": qwen_common.composed("qwen3-vl", QWEN3_TOWER, QWEN3, TOKENS, frames_apart=True),
    "qwen3-vl-moe": qwen_common.composed(
        "qwen3-vl-moe", QWEN3_TOWER, QWEN3.replace(num_experts=6, top_k=2, expert_dim=40), TOKENS, frames_apart=True
    ),
}
THIRD = ("qwen3-vl", "qwen3-vl-moe")
Row = tuple[float, float, float, Sequence[float], Sequence[float]]
FIRST2, FIRST3, FIRST_MOE = (
    (-3.172471, -3.337596, 2.569808, 3.538453),
    (-0.585708, 0.72778, 0.081099, -0.060657),
    (-0.592523, 0.746429, 0.090601, -0.058383),
)
LOGITS: dict[tuple[str, str], Row] = {
    ("qwen2-vl", "transformers-5"): (-0.00015669, 1.89020640, 179.6489877, FIRST2, (-0.265523, -1.772159)),
    ("qwen2-vl", "original"): (-0.00018418, 1.89767825, 180.3280317, FIRST2, (0.17633, -2.279807)),
    ("qwen2-vl", "text"): (-0.00449871, 1.94399265, 89.2155771, FIRST2, (-1.179979, 0.371824)),
    ("qwen2-vl", "image"): (0.00344206, 1.88928712, 111.5883531, FIRST2, (0.791031, -0.573867)),
    ("qwen2.5-vl", "transformers-5"): (0.00096655, 1.82584656, 174.7495586, FIRST2, (-0.501008, -1.255004)),
    ("qwen2.5-vl", "original"): (0.00055780, 1.84489978, 176.3842279, FIRST2, (0.368192, -2.052798)),
    # Text alone does not meet the tower: the row of Qwen2-VL.
    ("qwen2.5-vl", "text"): (-0.00449871, 1.94399265, 89.2155771, FIRST2, (-1.179979, 0.371824)),
    ("qwen2.5-vl", "image"): (0.00352094, 1.88322318, 111.6639566, FIRST2, (0.642551, -0.307403)),
    ("qwen3-vl", "transformers-5"): (-0.00437360, 0.67715766, 78.4575048, FIRST3, (-0.041295, 0.005404)),
    ("qwen3-vl", "original"): (-0.00437360, 0.67715766, 78.4575048, FIRST3, (-0.041295, 0.005404)),
    ("qwen3-vl", "text"): (0.00110565, 0.44379046, 22.4766480, FIRST3, (0.044041, 0.050133)),
    ("qwen3-vl", "image"): (-0.00671173, 0.58551714, 39.2200450, FIRST3, (0.157658, -0.34726)),
    ("qwen3-vl-moe", "original"): (-0.00564052, 0.63887145, 73.1541559, FIRST_MOE, (-0.029398, -0.055199)),
    ("qwen3-vl-moe", "text"): (0.00144957, 0.44060020, 22.2705181, FIRST_MOE, (0.024443, 0.024359)),
    ("qwen3-vl-moe", "image"): (-0.00795415, 0.56904785, 37.8627052, FIRST_MOE, (0.180559, -0.395043)),
}
TEXT_POSITIONS = {  # of the tokens behind the video
    ("qwen2-vl", "transformers-5"): [13, 14, 15, 16],
    ("qwen2-vl", "original"): [15, 16, 17, 18],
    ("qwen2.5-vl", "transformers-5"): [13, 14, 15, 16],
    ("qwen2.5-vl", "original"): [18, 19, 20, 21],
}


def filled(family: str) -> VisionLanguageModel:
    """The model with weights that follow from the names and shapes of transformers' modules."""
    config: VLMConfig = CONFIGS[family]
    model = vlkit.create_model(config)
    if family == "qwen2-vl":
        keys = qwen2_vl.keys(config, old=False)
    elif family == "qwen2.5-vl":
        keys = qwen2_5_vl.keys(config, old=False)
    else:
        keys = qwen3_vl.keys(config, turned=False)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(keys.to_ours(fill({step.target: step.shape for step in keys.plan_save(ours)})))
    return model.eval()


def batch(model: VisionLanguageModel, what: str) -> Batch:
    """A text, an image in text, or an image and a video in text, as the Hub processors would give them."""
    third = model.config.family in THIRD
    size = model.config.vision.patch_dim  # type: ignore[attr-defined]
    image = {"pixel_values": sequence("pixel_values", 24 * size).view(24, size).float(), "image_grid_thw": [(1, 4, 6)]}
    steps = 3 if third else 4
    video = {
        "pixel_values_videos": sequence("pixel_values_videos", steps * 16 * size).view(-1, size).float(),
        "video_grid_thw": [(steps, 4, 4)],
        **({"second_per_grid_ts": [1.0]} if model.config.family == "qwen2.5-vl" else {}),
    }
    head = [1, 2, 3, START, *[IMAGE] * 6, END, 5, 6]
    if third:
        middle = [token for frame in range(3) for token in (20 + frame, START, *[VIDEO] * 4, END)]
    else:
        middle = [START, *[VIDEO] * 16, END]
    ids, tensors = {
        "text": (list(range(1, 9)), {}),
        "image": (head, image),
        "all": ([*head, *middle, 7, 8, 9], {**image, **video}),
    }[what]
    made = {k: torch.tensor(v) if isinstance(v, list) and k.endswith("thw") else v for k, v in tensors.items()}
    return model.pack(input_ids=torch.tensor([ids]), **made)


@pytest.mark.parametrize(("family", "case"), LOGITS)
def test_logits(family: str, case: str) -> None:
    model = filled(family)
    inputs = batch(model, case if case in ("text", "image") else "all")
    if case == "transformers-5":
        inputs = replace(inputs, positions=model.positions(inputs, rule="transformers-5"))
    with torch.no_grad():
        check(model(inputs).logits.tokens, *LOGITS[family, case])


@pytest.mark.parametrize(("family", "rule"), TEXT_POSITIONS)
def test_positions_of_text_image_and_video(family: str, rule: str) -> None:
    model = vlkit.create_model(CONFIGS[family], device="meta")
    found = model.positions(batch(model, "all"), rule=rule)  # type: ignore[arg-type]
    assert found is not None

    times = [11, 12, 13, 14] if family == "qwen2-vl" else [11, 13, 15, 17]
    image = [(4, row, column) for row in (4, 5) for column in (4, 5, 6)]
    video = [(time, row, column) for time in times for row in (11, 12) for column in (11, 12)]
    text = TEXT_POSITIONS[family, rule]
    want = [*same(0, 1, 2, 3), *image, *same(7, 8, 9, 10), *video, *same(*text)]
    assert found.tolist() == [list(position) for position in want]


@pytest.mark.parametrize("rule", ["original", "transformers-5"])
def test_positions_of_frames_that_stand_apart(rule: str) -> None:
    """Every frame counts as an image, so both rules agree."""
    model = vlkit.create_model(CONFIGS["qwen3-vl"], device="meta")
    found = model.positions(batch(model, "all"), rule=rule)  # type: ignore[arg-type]
    assert found is not None

    image = [(4, row, column) for row in (4, 5) for column in (4, 5, 6)]
    want = [*same(0, 1, 2, 3), *image, *same(7, 8, 9)]
    for start in (12, 17, 22):
        frame = [(start, row, column) for row in (start, start + 1) for column in (start, start + 1)]
        want += [*same(start - 2, start - 1), *frame, *same(start + 2)]
    want += same(25, 26, 27)
    assert found.tolist() == [list(position) for position in want]


def same(*numbers: int) -> list[tuple[int, int, int]]:
    """Text: one number on all axes."""
    return [(n, n, n) for n in numbers]


def test_weights_by_formula_begin_as_published() -> None:
    want = torch.tensor([0.99188496, 0.50164029, 0.01139563, -0.47884904], dtype=torch.float64)
    torch.testing.assert_close(sequence("pixel_values", 4), want, atol=1e-8, rtol=0)
