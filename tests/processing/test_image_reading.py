from __future__ import annotations

import base64
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.errors import ImageError, VideoError
from vlkit.processing import ReadRule, read_image
from vlkit.processing.image_size import image_size
from vlkit.processing.video_reading import open_video

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def gradient(height: int = 5, width: int = 7) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_path_bytes_pil_array_and_tensor_are_the_same_image(tmp_path: Path) -> None:
    image = gradient()
    image.save(tmp_path / "a.png")
    expected = np.asarray(image)

    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        encoded(image),
        image,
        expected,
        torch.from_numpy(expected.copy()),
        expected.astype(np.int64),
        torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255,
    ):
        read = read_image(source)
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), expected)


def test_what_other_libraries_pass_around_is_the_same_image(tmp_path: Path) -> None:
    content = encoded(gradient())
    (tmp_path / "a.png").write_bytes(content)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    expected = np.asarray(gradient())

    with (tmp_path / "a.png").open("rb") as file:
        for source in (
            io.BytesIO(content),
            file,
            address,
            address.replace("data:", "DATA:"),
            f"file://{tmp_path}/a.png",
            {"bytes": content, "path": None},
            {"bytes": content, "path": "gone.png"},
            {"bytes": None, "path": str(tmp_path / "a.png")},
        ):
            np.testing.assert_array_equal(np.asarray(read_image(source)), expected)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("data:image/png,abc", "must be 'data:<type>;base64,<characters>'"),
        ("data:image/png;base64,a*c=", "image 3: the data: address is damaged"),
        ("data:image/png;base64," + "AAAA" * 400, "more than 999 bytes.*ReadRule.max_source_bytes"),
        (io.BytesIO(bytes(1000)), "more than 999 bytes"),
        (io.StringIO("abc"), "reading gives str; open the file in mode 'rb'"),
        (
            {"bytes": b"", "path": "a", "label": 1},
            "expected {'bytes': ..., 'path': ...}, found 'bytes', 'path', 'label'",
        ),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
        ({"path": "https://example.org/a.png"}, "is an address; fetch it first"),
    ],
)
def test_sources_that_hold_no_image_are_refused(source: object, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        read_image(source, ReadRule(max_source_bytes=999), name="image 3")


def test_an_integer_image_that_can_be_8_or_16_bit_is_refused() -> None:
    """The array of the same numbers is 8 bit; read as 16 the image would be black."""
    image = gradient().convert("I")

    with pytest.raises(ImageError, match=r"mode 'I' with values up to 2\d\d can be 8 bit or a dark image of 16"):
        read_image(image)

    grey = np.asarray(gradient().convert("L"))
    np.testing.assert_array_equal(np.asarray(read_image(image.convert("L")))[..., 0], grey)
    assert np.asarray(read_image(image.convert("I;16"))).max() == 1
    assert np.asarray(read_image(Image.new("I", (2, 2)))).max() == 0
    image.format = "PNG"  # as older versions of Pillow open 16 bit files
    assert np.asarray(read_image(image)).max() == 1


def test_transparent_pixels_show_the_background_not_their_hidden_colour() -> None:
    hidden = Image.new("RGBA", (3, 2), (*RED, 0))
    half = Image.new("RGBA", (3, 2), (0, 0, 0, 128))

    assert read_image(hidden).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(hidden, ReadRule(background=(1, 2, 3))).getpixel((0, 0)) == (1, 2, 3)
    assert read_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert read_image(np.asarray(hidden)).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_entry_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)

    read = read_image(encoded(image, transparency=0))

    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), BLUE]


def test_rgb_with_a_transparent_colour_shows_the_background() -> None:
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((1, 0), BLUE)

    read = read_image(encoded(image, transparency=GREEN))

    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), BLUE]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("P", 0, (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), RED),
        ("RGBX", (9, 8, 7, 0), (9, 8, 7)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16B", 32896, (128, 128, 128)),
        ("I", 257, (1, 1, 1)),
        ("F", 0.2, (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    image = Image.new(mode, (3, 2), None if mode == "P" else colour)
    if mode == "P":
        image.putpalette([10, 20, 30])

    read = read_image(image)

    assert read.mode == "RGB"
    assert read.getpixel((2, 1)) == expected


def test_a_16_bit_file_keeps_its_greys() -> None:
    """Converted by Pillow, everything above 255 of 65535 would become white."""
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)

    read = read_image(encoded(Image.fromarray(levels)))

    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert read_image(levels).tobytes() == read.tobytes()


def test_floats_are_rounded_not_cut_off() -> None:
    assert read_image(np.array([[100.6 / 255]])).getpixel((0, 0)) == (101, 101, 101)


def test_orientation_is_applied_once() -> None:
    image = gradient(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned = encoded(image, exif=exif)

    read = read_image(turned)

    np.testing.assert_array_equal(np.asarray(read), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))
    np.testing.assert_array_equal(np.asarray(read_image(read)), np.asarray(read))
    assert read_image(turned, ReadRule(upright=False)).size == (6, 4)


def test_an_animation_gives_its_first_frame_and_a_warning() -> None:
    content = encoded(
        Image.new("RGB", (4, 4), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), BLUE)]
    )

    with pytest.warns(UserWarning, match="image 3: has 2 frames; only the first is used"):
        read = read_image(content, name="image 3")

    assert read.getpixel((0, 0)) == RED


def test_a_frame_that_was_sought_does_not_count() -> None:
    content = encoded(
        Image.new("RGB", (4, 4), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), BLUE)]
    )
    opened = Image.open(io.BytesIO(content))
    opened.seek(1)

    with pytest.warns(UserWarning, match="frames"):
        assert read_image(opened).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.full((2, 3), np.nan, np.float32), "6 of 6 values are NaN or infinite"),
        (np.array([[0.0, np.inf]]), "1 of 2 values are NaN or infinite"),
        (np.array([[0.0, 255.0]]), "values from 0.0 to 255.0; expected 0 to 1"),
        (np.array([[-0.5, 0.5]]), "values from -0.5 to 0.5; expected 0 to 1"),
        (np.array([[0, 256]]), "values from 0 to 256; expected 0 to 255"),
        (np.array([[-1, 3]]), "values from -1 to 3"),
        (np.zeros((3, 100, 3), np.uint8), r"shape \(3, 100, 3\) can be read as \[c, h, w\] or as \[h, w, c\]"),
        (np.zeros((5, 100, 7), np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros((1, 3, 5, 5), np.uint8), r"shape \(1, 3, 5, 5\) is not"),
        (np.zeros(5, np.uint8), r"shape \(5,\) is not"),
        (np.zeros((0, 5), np.uint8), "5x0 pixels"),
        (np.zeros((5, 0, 3), np.uint8), "0x5 pixels"),
        (np.zeros((2, 2), np.complex64), "array of complex64 is not an image"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray, match: str) -> None:
    with pytest.raises(ImageError, match=f"image 4: .*{match}"):
        read_image(array, name="image 4")


def test_an_ambiguous_array_is_read_as_told() -> None:
    array = np.zeros((3, 100, 4), np.uint8)

    assert read_image(array, ReadRule(array_layout="chw")).size == (4, 100)
    assert read_image(array, ReadRule(array_layout="hwc")).size == (100, 3)
    with pytest.raises(ImageError, match="has 5 channels"):
        read_image(np.zeros((3, 9, 5), np.uint8), ReadRule(array_layout="hwc"))


@pytest.mark.parametrize("keep", [0, 4, 20, 60, -1])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_refused(format: str, keep: int) -> None:
    content = encoded(gradient(40, 40), format)
    cut = content[: keep if keep >= 0 else len(content) // 2]

    with pytest.raises(ImageError, match="image 2"):
        read_image(cut, name="image 2")


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 99]
)
def test_junk_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(content)

    with pytest.raises(ImageError, match=r"image 1 \(.*photo\.png"):
        read_image(tmp_path / "photo.png", name="image 1")


def test_other_formats_are_refused() -> None:
    content = encoded(gradient(), "PPM")

    with pytest.raises(ImageError, match="no image of the formats PNG, JPEG"):
        read_image(content)
    assert read_image(content, ReadRule(formats=("PPM",))).size == (7, 5)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    """The file says 20000 x 20000 and ends there: a decoder would complain of something else."""
    header = encoded(Image.new("1", (20000, 20000)))[:200]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="max_source_pixels"):
            read_image(header)
    with pytest.raises(ImageError, match="7x5 pixels are 35; at most 34 are decoded"):
        read_image(encoded(gradient()), ReadRule(max_source_pixels=34))


@pytest.mark.parametrize("source", [None, 3, ["a.png"], object()])
def test_what_is_no_image_at_all_is_named(source: object) -> None:
    with pytest.raises(ImageError, match=f"found builtins.{type(source).__name__}"):
        read_image(source)


def test_addresses_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is an address; fetch it first"):
        read_image("https://example.org/cat.png")
    with pytest.raises(ImageError, match=r"cannot be read.*No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b")


def test_a_named_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        for read, kind in ((read_image, ImageError), (image_size, ImageError), (open_video, VideoError)):
            with pytest.raises(kind, match="expected a plain file, found a pipe"):
                read(path)
