"""read_image: a path, bytes, PIL image, array or tensor becomes an upright RGB image, or an ImageError says why not.

file --limits, decode--> PIL --first frame, upright, 16 bit to 8, transparency composited--> RGB, 8 bit per channel
"""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from vlkit.config import AtLeast, AtMost, Config, Size
from vlkit.errors import ImageError

ORIENTATION = 0x0112
"""The EXIF tag."""
Level = Annotated[int, AtLeast(0), AtMost(255)]
"""A brightness of 0 to 255."""


class ReadRule(Config):
    """What is accepted as an image and how it becomes RGB.

    Attributes:
        formats: File formats that may be opened, by their Pillow names.
        max_source_pixels: Larger files are refused before they are decoded.
        max_source_bytes: The same for data: addresses and open files, before they are read whole.
        upright: Whether the EXIF orientation is applied.
        background: What shows through transparent pixels.
        array_layout: Axis order of 3-D arrays and tensors. "auto" takes the end that has 1, 3 or 4 entries, and refuses
            when both have.
    """

    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
    max_source_pixels: Size = 89_478_485
    max_source_bytes: Size = 2**28
    upright: bool = True
    background: tuple[Level, Level, Level] = (255, 255, 255)
    array_layout: Literal["auto", "chw", "hwc"] = "auto"


def read_image(source: Any, rule: ReadRule | None = None, *, name: str = "image") -> Image.Image:
    """The image as upright 8-bit RGB.

    Integers in arrays are grey levels 0..255 (uint16: 0..65535), floats are 0..1, booleans black and white.
    Animations give their first frame, with a warning.

    Args:
        source: A path, the bytes of a file, an open file, a data: address, {"bytes": ..., "path": ...} as data sets of
            Hugging Face have it, a PIL image, an array or a tensor [h, w], [h, w, c] or [c, h, w].
        name: What the errors call it, such as "image 3".

    Raises:
        ImageError: It cannot be read, is not of the formats allowed, is too large, is empty, has NaN, infinity or
            values out of range, or its axes are ambiguous.
    """
    rule = rule or ReadRule()
    source = path_or_bytes(source, rule, name)
    if isinstance(source, Path):
        name = f"{name} ({str(source)!r})"
        check_plain(source, name)
        try:
            source = source.read_bytes()
        except (OSError, ValueError) as error:
            raise ImageError(f"{name}: cannot be read: {error}") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = open_image(bytes(source), rule, name)
    if isinstance(source, Image.Image):
        return _from_pil(source, rule, name)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source, rule, name)
    raise no_image(source, name)


def check_plain(path: Path, name: str) -> None:
    """Refuse what is no plain file: opening a named pipe waits for ever, and a device may have no end.

    Raises:
        ImageError: It is something else, or is not there.
    """
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read: {error}") from error
    if not plain:
        what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise ImageError(f"{name}: cannot be read: expected a plain file, found {what}; give the bytes or a file")


def no_image(source: Any, name: str) -> ImageError:
    """The error for what no image can be read from."""
    return ImageError(
        f"{name}: expected a path, bytes, an open file, a PIL image, an array or a tensor, found {type(source).__module__}."
        f"{type(source).__qualname__}"
    )


def path_or_bytes(source: Any, rule: ReadRule, name: str) -> Any:
    """The path or the bytes that a source means; what is neither stays as it is. Nothing is fetched.

    Raises:
        ImageError: An address of the network, a malformed data: address, too many bytes, or a file opened as text.
    """
    if isinstance(source, Mapping):
        if not source or set(source) - {"bytes", "path"}:
            raise ImageError(f"{name}: expected {{'bytes': ..., 'path': ...}}, found {', '.join(map(repr, source))}")
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            raise ImageError(f"{name}: neither 'bytes' nor 'path' holds something to read")
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if path[:5].lower() == "data:":
            return _from_data_address(path, rule, name)
        if path[:8].lower().startswith(("http://", "https://")):
            raise ImageError(f"{name}: {path[:60]!r} is an address; fetch it first and give the bytes or a file")
        return Path(path.removeprefix("file://"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if callable(getattr(source, "read", None)) and not isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        try:
            content = source.read(rule.max_source_bytes + 1)
        except (OSError, ValueError) as error:  # closed, for example
            raise ImageError(f"{name}: cannot be read: {error}") from error
        if not isinstance(content, bytes):
            raise ImageError(f"{name}: reading gives {type(content).__name__}; open the file in mode 'rb'")
        _check_bytes(len(content), rule, name)
        return content
    return source


def _from_data_address(address: str, rule: ReadRule, name: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{name}: a data: address must be 'data:<type>;base64,<characters>', found {address[:40]!r}")
    _check_bytes(len(body) // 4 * 3, rule, name)
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ImageError(f"{name}: the data: address is damaged: {error}") from error


def _check_bytes(count: int, rule: ReadRule, name: str) -> None:
    if count > rule.max_source_bytes:
        raise ImageError(
            f"{name}: more than {rule.max_source_bytes} bytes. If you trust it, raise ReadRule.max_source_bytes"
        )


def open_image(content: bytes | IO[bytes], rule: ReadRule, name: str) -> Image.Image:
    """The image in the bytes of a file, or in an open one, not yet decoded.

    Raises:
        ImageError: It is none, or of a format that is not allowed.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    head = file.read(64)
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: this is a Git LFS pointer, not the image; run `git lfs pull`")
    try:
        return Image.open(file, formats=rule.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: {error}; to allow it raise ReadRule.max_source_pixels and PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: {file.seek(0, io.SEEK_END)} bytes that are no image of the formats {', '.join(rule.formats)}"
        ) from error
    except Exception as error:  # Pillow's plug-ins raise whatever their parser meets
        raise ImageError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error


def _from_pil(image: Image.Image, rule: ReadRule, name: str) -> Image.Image:
    width, height = image.size
    check_size(height, width, rule, name)
    try:
        num_frames = getattr(image, "n_frames", 1)
        if num_frames > 1:
            if image.format != "MPO":  # a photograph with a second picture, such as a depth map, behind it
                warnings.warn(f"{name}: has {num_frames} frames; only the first is used", stacklevel=5)
            image.seek(0)
        image.load()
        if rule.upright and image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's plug-ins raise whatever their parser meets
        if isinstance(error, Warning):
            raise
        raise ImageError(f"{name}: truncated or damaged: {type(error).__name__}: {error}") from error
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image).astype(np.float32) / 257)
    if image.mode == "I":
        if image.format != "PNG" and 0 < np.asarray(image).max() <= 255:  # PNG has 16 bits, never 32
            raise ImageError(
                f"{name}: mode 'I' with values up to {np.asarray(image).max()} can be 8 bit or a dark image of 16; "
                f"give image.convert('L') or image.convert('I;16')"
            )
        return _from_array(_within(np.asarray(image), 0, 65535, name).astype(np.uint16), rule, name)
    if image.mode == "F":
        return _from_array(np.asarray(image), rule, name)
    try:
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, (*rule.background, 255))
            return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name}: mode {image.mode!r} cannot be turned into RGB: {error}") from error


def _from_array(array: np.ndarray, rule: ReadRule, name: str) -> Image.Image:
    array = channels_last(array, rule, name)
    check_size(array.shape[0], array.shape[1], rule, name)
    if array.dtype == np.bool_:
        levels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8:
        levels = array
    elif array.dtype == np.uint16:
        levels = _rounded(array.astype(np.float32) / 257)
    elif np.issubdtype(array.dtype, np.integer):
        levels = _within(array, 0, 255, name).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ImageError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite")
        levels = _rounded(_within(array, 0, 1, name).astype(np.float32) * 255)
    else:
        raise ImageError(f"{name}: an array of {array.dtype} is not an image")
    if levels.flags.c_contiguous and levels.shape[2] > 1:
        return _from_pil(Image.fromarray(levels), rule, name)
    # Channels first: Pillow puts planes together several times as fast as NumPy turns the array around.
    planes = [Image.fromarray(np.ascontiguousarray(levels[..., channel])) for channel in range(levels.shape[2])]
    return _from_pil(planes[0] if len(planes) == 1 else Image.merge("RGBA"[: len(planes)], planes), rule, name)


def channels_last(array: np.ndarray, rule: ReadRule, name: str) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(f"{name}: an array of shape {array.shape} is not [h, w], [h, w, c] or [c, h, w]")
    layout = rule.array_layout
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    if layout == "auto":
        if first and last:
            raise ImageError(
                f"{name}: shape {array.shape} can be read as [c, h, w] or as [h, w, c]; "
                f"set ReadRule.array_layout to 'chw' or 'hwc'"
            )
        if not first and not last:
            raise ImageError(f"{name}: shape {array.shape} has no axis of 1, 3 or 4 channels at either end")
        layout = "chw" if first else "hwc"
    channels = array.shape[0] if layout == "chw" else array.shape[2]
    if channels not in (1, 3, 4):
        raise ImageError(f"{name}: shape {array.shape} as {layout} has {channels} channels; an image has 1, 3 or 4")
    return array.transpose(1, 2, 0) if layout == "chw" else array


def check_size(height: int, width: int, rule: ReadRule, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: {width}x{height} pixels (width x height): there is nothing to see")
    if height * width > rule.max_source_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels are {height * width}; at most {rule.max_source_pixels} are decoded. "
            f"If you trust it, raise ReadRule.max_source_pixels"
        )


def _within(array: np.ndarray, low: int, high: int, name: str) -> np.ndarray:
    least, most = array.min(), array.max()
    if least < low or most > high:
        raise ImageError(
            f"{name}: {array.dtype} values from {least} to {most}; expected {low} to {high}. Scale them first"
        )
    return array


def _rounded(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).astype(np.uint8)


def _grey_to_rgb(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(_rounded(levels)).convert("RGB")
