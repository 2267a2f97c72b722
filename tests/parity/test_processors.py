"""vlkit's processors against those of transformers: pixels, grids, frames, ids, and both through `model.pack`.

Each resampler agrees with that of transformers to rounding (1e-6). Between the two lies one grey level of 255, and two levels
in 14 of a million values (largest seen).
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from tests.assets import asset
from vlkit.errors import UnknownFieldWarning
from vlkit.models.factory import build
from vlkit.packing import Packed
from vlkit.processing import Processor, ProcessorConfig, load_tokenizer, pack_images, pack_video
from vlkit.processing.hub_files import processor_config as hub_config
from vlkit.registry import model_spec

SIZES = [(1, 1), (27, 29), (98, 98), (42, 70), (333, 77), (480, 641), (1081, 719), (28, 1000)]
QWEN2, QWEN3 = model_spec("qwen2-vl-2b").processor, model_spec("qwen3-vl-2b").processor


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves with some noise: neither flat nor all noise, which no filter leaves alone."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (7 + c) + seed) * np.cos(y / (11 - c)) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 9, (height, width, 3))
    return Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8))


def theirs(patches: Packed, merge_size: int = 2) -> Tensor:
    """The patches block by block, as Qwen lists them."""
    items = [
        rearrange(item, "(t h a w b) d -> (t h w a b) d", t=t, h=h // merge_size, a=merge_size, b=merge_size)
        for item, (t, h, _) in zip(patches.unpack(), patches.layout.grids or (), strict=True)
    ]
    return torch.cat(items)


def assert_same_pixels(ours: Tensor, expected: Tensor, config: ProcessorConfig, levels: int) -> None:
    """No value is further off than so many grey levels, and of 10,000 at most one by more than one level."""
    level = 1 / 255 / min(config.image.std)
    assert_close(ours, expected, atol=max(levels * level, 1e-6) * 1.01, rtol=0)
    if levels > 1:
        assert ((ours - expected).abs() > 1.01 * level).float().mean() < 1e-4


def image_processor(config: ProcessorConfig, backend: str) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    rule = config.image
    return {"torchvision": Qwen2VLImageProcessor, "pil": Qwen2VLImageProcessorPil}[backend](
        patch_size=rule.patch_size,
        size={"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        image_mean=list(rule.mean),
        image_std=list(rule.std),
    )


def video_processor(config: ProcessorConfig) -> Any:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    assert config.video is not None
    third = config.video.budget == "video"
    return (Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor)(
        patch_size=config.image.patch_size,
        size={"shortest_edge": config.video.min_pixels, "longest_edge": config.video.max_pixels},
        image_mean=list(config.image.mean),
        image_std=list(config.image.std),
        cap_pixels_per_frame=False,
        do_sample_frames=True,
        fps=2,
    )


@pytest.mark.parametrize(
    ("resampler", "backend", "levels"),
    [("pillow", "pil", 0), ("torch", "torchvision", 0), ("pillow", "torchvision", 2)],
)
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2-vl", "qwen3-vl"])
def test_images_become_the_same_patches(config: ProcessorConfig, resampler: str, backend: str, levels: int) -> None:
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]

    ours = pack_images(images, config.image.replace(resampler=resampler))
    expected = image_processor(config, backend)(images, return_tensors="pt")

    assert ours.layout.grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))
    assert_same_pixels(theirs(ours), expected["pixel_values"], config, levels)


@pytest.mark.parametrize("size", [(77, 133), (240, 320), (20, 200)])
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2-vl", "qwen3-vl"])
@pytest.mark.parametrize("num_frames", [2, 9, 110])
def test_videos_become_the_same_patches(config: ProcessorConfig, size: tuple[int, int], num_frames: int) -> None:
    """Frames sampled from 30 a second, an odd last one repeated."""
    from transformers.video_utils import VideoMetadata

    assert config.video is not None
    few = config.replace(video=config.video.replace(max_pixels=200_000))
    frames = np.stack([np.asarray(picture(*size, seed)) for seed in range(num_frames)])

    ours = pack_video(frames, few.image, few.video, fps=30)
    expected = video_processor(few)(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        video_metadata=VideoMetadata(total_num_frames=num_frames, fps=30),
        return_tensors="pt",
    )

    assert ours.patches.layout.grids == tuple(map(tuple, expected["video_grid_thw"].tolist()))
    assert_same_pixels(theirs(ours.patches), expected["pixel_values_videos"], config, 0)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The true vocabulary of Qwen3, by transformers and by vlkit."""

    @cache
    def load() -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        folder: Path = tmp_path_factory.mktemp("qwen3")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(asset(f"qwen3-{name}"), folder / name)
        return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)

    return load


def model_for(name: str, patch_size: int) -> Any:
    """A small model without values, with the published ids and patch size: packing needs no more."""
    small, published = model_spec(name + "-tiny").config, model_spec(name + ("-3b" if "2.5" in name else "-2b")).config
    ids = ("image_token_id", "video_token_id", "vision_marks", "stop_ids")
    windows = {"window_size": 8 * patch_size} if "2.5" in name else {}
    return build(
        small.replace(
            vision=small.vision.replace(patch_size=patch_size, **windows),  # type: ignore[attr-defined]
            llm=small.llm.replace(vocab_size=151936),  # type: ignore[attr-defined]
            **{field: getattr(published, field) for field in ids},
        ),
        device="meta",
    )


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_whole_conversations_become_the_same_batch(name: str, vocabulary: Any) -> None:
    """Two conversations with images and videos of several sizes, padded there: ids, patches, times and their order."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    their_tokenizer, our_tokenizer = vocabulary()
    config = QWEN3 if name == "qwen3-vl" else QWEN2
    assert config.video is not None
    # transformers writes marks around a whole video, too; the published checkpoints are older.
    outer = {"video_prefix": "<|vision_start|>", "video_suffix": "<|vision_end|>"}
    config = config.replace(
        chat=config.chat.replace(**outer), video=config.video.replace(max_pixels=100_000, min_pixels=4096)
    )
    cls = {"qwen2-vl": Qwen2VLProcessor, "qwen2.5-vl": Qwen2_5_VLProcessor, "qwen3-vl": Qwen3VLProcessor}[name]
    reference = cls(image_processor(config, "torchvision"), their_tokenizer, video_processor(config), chat_template="")
    clips = [np.stack([np.asarray(picture(77, 133, s)) for s in range(n)]) for n in (31, 58)]
    rates = (10.0, 24.0)
    images = [picture(99, 201), picture(301, 64, 1)]
    system = "" if name == "qwen3-vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    texts = [
        f"{system}<|im_start|>user\n{image}\nand{video}what?<|im_end|>\n<|im_start|>assistant\n",
        f"{system}<|im_start|>user\n{video}{image}<|im_end|>\n<|im_start|>assistant\n",
    ]
    their_tokenizer.padding_side = "left"

    expected = reference(
        text=texts,
        images=images,
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips],
        video_metadata=[VideoMetadata(total_num_frames=len(c), fps=r) for c, r in zip(clips, rates, strict=True)],
        padding=True,
        return_tensors="pt",
    )
    parts = [{"type": "video", "video": clip, "fps": rate} for clip, rate in zip(clips, rates, strict=True)]
    pictures = [{"type": "image", "image": each} for each in images]
    said = [{"type": "text", "text": each} for each in ("\nand", "what?")]
    batch = Processor(config, our_tokenizer)(
        [
            [{"role": "user", "content": [pictures[0], said[0], parts[0], said[1]]}],
            [{"role": "user", "content": [parts[1], pictures[1]]}],
        ]
    )

    packed = model_for(name, config.image.patch_size).pack(**expected)
    assert packed.ids.layout == batch.ids.layout
    assert torch.equal(packed.ids.tokens, batch.ids.tokens)
    assert packed.patches.layout == batch.patches.layout
    assert_same_pixels(packed.patches.tokens, batch.patches.tokens, config, 0)
    if name == "qwen2.5-vl":
        assert packed.seconds == pytest.approx(batch.seconds)


EDITS: dict[str, dict[str, Any]] = {
    "bilinear": {"resample": 2},
    "no mean and std": {"do_normalize": False},
    "values in -1..1": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "no rescaling": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    "neither": {"do_rescale": False, "do_normalize": False},
    "max_pixels beside size": {"size": {"shortest_edge": 64, "longest_edge": 40960}, "max_pixels": 10_000},
    "min_pixels beside size": {"size": {"shortest_edge": 64, "longest_edge": 40960}, "min_pixels": 30_000},
}


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_edited_files_mean_what_they_mean_in_transformers(family: str, edit: str, kind: str, tmp_path: Path) -> None:
    """What a person changes in a saved folder, each field for itself; values up to 255, so the bound is relative."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    config = QWEN3 if family == "qwen3_vl" else QWEN2
    image_processor(config, "torchvision").save_pretrained(tmp_path)
    video_processor(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    path = tmp_path / ("preprocessor_config.json" if kind == "images" else "video_preprocessor_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | EDITS[edit]))
    frames = np.stack([np.asarray(picture(77, 133, seed)) for seed in range(4)])

    ignored = family == "qwen3_vl" and kind == "videos" and "beside" in edit
    with pytest.warns(UnknownFieldWarning, match="_pixels") if ignored else nullcontext():
        ours = hub_config(tmp_path)
    if kind == "images":
        got = pack_images([frames[0]], ours.image)
        expected = AutoImageProcessor.from_pretrained(tmp_path)([Image.fromarray(frames[0])], return_tensors="pt")
        values, grid = expected["pixel_values"], expected["image_grid_thw"]
    else:
        assert ours.image.mean == config.image.mean
        got = pack_video(frames, ours.image, ours.video).patches
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
        expected = AutoVideoProcessor.from_pretrained(tmp_path)(clip, return_tensors="pt", do_sample_frames=False)
        values, grid = expected["pixel_values_videos"], expected["video_grid_thw"]

    assert got.layout.grids == tuple(map(tuple, grid.tolist()))
    assert_close(theirs(got), values.float(), atol=1e-6, rtol=1e-6)
