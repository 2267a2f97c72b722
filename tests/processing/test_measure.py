"""What a conversation costs, known before any pixel is decoded, is what its batch then has."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from vlkit.errors import ConfigError, ImageError, SequenceTooLongError, TemplateError
from vlkit.models.factory import create_processor
from vlkit.processing import ImageRule, Processor, ProcessorConfig, ReadRule, VideoRule, read_image
from vlkit.processing.chat_format import CHAT_FORMATS
from vlkit.processing.image_size import image_size

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 45, 3), dtype=np.uint8)
FITS: dict[str, dict[str, Any]] = {
    "pad": {"max_patches": 40},
    "resize": {"min_pixels": 2000, "max_pixels": 9000, "max_patches": None},
    "letterbox": {"max_pixels": 9000, "longest": 112, "max_patches": None},
    "letterbox-chat": {"max_pixels": 9000, "min_pixels": 900, "longest": 112, "max_patches": None},
    "stretch": {"max_side": 4},
}
PROCESSORS = {fit: Processor(ProcessorConfig(image=ImageRule(fit=fit, **more))) for fit, more in FITS.items()}  # type: ignore[arg-type]
ANSWER = {"role": "assistant", "content": "yes"}


def saved(format: str, orientation: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(file, format, exif=exif, **options)
    return file.getvalue()


def asked(*images: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": each} for each in images]}, ANSWER]


def cost(processor: Processor, messages: Any, **options: Any) -> tuple[int, int]:
    batch = processor(messages, **options)
    return batch.ids.layout.num_tokens, 0 if batch.patches is None else batch.patches.layout.num_tokens


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_image_is_measured_upright(tmp_path: Path, format: str, orientation: int) -> None:
    content = saved(format, orientation)
    (tmp_path / "a").write_bytes(content)
    expected = read_image(content)
    assert expected.size == ((30, 45) if orientation > 4 else (45, 30))
    for source in (
        content,
        tmp_path / "a",
        {"path": str(tmp_path / "a")},
        io.BytesIO(content),
        Image.open(tmp_path / "a"),
    ):
        assert image_size(source) == expected.size[::-1]
        assert read_image(source).size == expected.size
    kept = ReadRule(upright=False)
    assert image_size(content, kept) == read_image(content, kept).size[::-1]


def test_a_png_turned_behind_its_pixels_is_measured_upright() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>', zip=False)
    early, late = saved("PNG", pnginfo=info), saved("PNG", 6)
    where = late.index(b"eXIf") - 4
    size = 12 + int.from_bytes(late[where : where + 4])
    chunk, rest = late[where : where + size], late[:where] + late[where + size :]
    late = rest[:-12] + chunk + rest[-12:]
    for content in (early, late):
        assert image_size(content) == read_image(content).size[::-1]
    assert image_size(late) == (45, 30)


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [saved(format, 6) for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")]
    contents.append(saved("PNG")[:200])  # cut off within its pixels

    def refuse(*_: Any) -> None:
        raise AssertionError("decoded")

    for plugin in ("JpegImagePlugin.JpegImageFile", "PngImagePlugin.PngImageFile", "WebPImagePlugin.WebPImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", refuse)
    assert [image_size(content) for content in contents] == [(45, 30)] * 4 + [(30, 45)] * 3
    assert PROCESSORS["pad"].measure(asked(contents[-1]), labels=True).patches == 16


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), max_size=3),
    st.sampled_from(sorted(FITS)),
    st.sampled_from([None, 784, 3000]),
    st.booleans(),
)
def test_the_cost_is_that_of_the_batch(sizes: Any, fit: str, max_pixels: int | None, labels: bool) -> None:
    images: list[Any] = [np.zeros((*size, 3), np.uint8) for size in sizes if max(size) / min(size) < 20]
    if len(images) > 1:
        images[1] = torch.from_numpy(images[1]).permute(2, 0, 1)
        if 3 in images[1].shape[1:] or 1 in images[1].shape[1:]:
            images.pop(1)
    options: dict[str, Any] = {"labels": labels, "max_pixels": None if fit == "stretch" else max_pixels}
    try:
        expected = cost(PROCESSORS[fit], asked(*images), **options)
    except ImageError:
        return
    assert PROCESSORS[fit].measure(asked(*images), **options) == expected


def test_images_beside_and_videos_are_measured_too(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for index in range(7):
        Image.fromarray(PIXELS).save(tmp_path / "frames" / f"{index}.png")
    frames = [Image.fromarray(PIXELS + index) for index in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=250)
    rules = (VideoRule(min_pixels=784, max_pixels=3136), VideoRule(min_pixels=784, max_pixels=9000, budget="video"))
    content = [{"type": "image"}, {"type": "video"}, {"type": "video", "fps": 3}, {"type": "text", "text": "?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}, ANSWER]
    for video in rules:
        for chat in ("chatml", "qwen3-vl"):
            image = ImageRule(fit="resize", max_pixels=3136, max_patches=None, frames_per_patch=2)
            processor = Processor(ProcessorConfig(chat=CHAT_FORMATS[chat], image=image, video=video))
            given = {"images": PIXELS, "videos": [str(tmp_path / "frames"), str(tmp_path / "a.gif")]}
            for max_pixels in (None, 784):
                options: dict[str, Any] = {**given, "labels": True, "max_pixels": max_pixels}
                expected = cost(processor, messages, **options)
                assert processor.measure(messages, **options) == expected
                assert max_pixels is None or expected[1] == (1 + 4 + 2) * 4  # one token for every time step


def test_a_cap_makes_images_smaller_and_nothing_else() -> None:
    processor = create_processor("qwen2-vl-tiny")
    messages = asked(PIXELS, np.zeros((200, 300, 3), np.uint8))
    whole, capped = processor(messages), processor(messages, max_pixels=3000)
    assert whole.patches is not None
    assert capped.patches is not None
    size = processor.config.image.patch_size
    assert all(h * w * size**2 <= 3000 for _, h, w in capped.patches.layout.grids or ())
    assert capped.patches.layout.num_tokens < whole.patches.layout.num_tokens
    same = processor(messages, max_pixels=10**9)
    assert same.patches is not None
    assert torch.equal(same.patches.tokens, whole.patches.tokens)
    assert processor.config.image.max_pixels != 3000


def test_what_cannot_be_measured_is_refused() -> None:
    processor = PROCESSORS["pad"]
    with pytest.raises(ConfigError, match="at least one token, 784 pixels"):
        processor.measure(asked(PIXELS), max_pixels=783)
    with pytest.raises(ConfigError, match="stretches all images to one size"):
        PROCESSORS["stretch"](asked(PIXELS), max_pixels=900)
    with pytest.raises(ImageError, match=r"image 1: .*nothing to see"):
        processor.measure(asked(PIXELS, np.zeros((0, 5, 3))))
    with pytest.raises(ImageError, match=r"image 0 \('gone\.png'\): cannot be read"):
        processor.measure(asked("gone.png"))
    with pytest.raises(ImageError, match="bytes that are no image"):
        processor.measure(asked(b"junk"))
    with pytest.raises(ImageError, match="expected a path"):
        processor.measure(asked(3))
    with pytest.raises(TemplateError, match="one conversation"):
        processor.measure([asked(PIXELS)])  # type: ignore[list-item]
    short = Processor(processor.config.replace(max_length=8))
    with pytest.raises(SequenceTooLongError, match="at most 8 fit"):
        short.measure(asked(PIXELS))
