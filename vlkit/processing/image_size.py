"""image_size: how large an image will be once it is upright RGB, from its header alone.

Matches: the size that `read_image` gives, on every format, orientation and kind of source in the tests. What is only wrong with
the pixels is not noticed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from vlkit.errors import ImageError
from vlkit.processing.image_reading import (
    ORIENTATION,
    ReadRule,
    channels_last,
    check_plain,
    check_size,
    no_image,
    open_image,
    path_or_bytes,
)

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def image_size(source: Any, rule: ReadRule | None = None, *, name: str = "image") -> tuple[int, int]:
    """Height and width of an image in pixels, upright, without decoding it.

    Args:
        source: As `read_image` takes it.
        name: What the errors call it.

    Raises:
        ImageError: There is no such image, it is too large or empty, or its axes are ambiguous.
    """
    rule = rule or ReadRule()
    given, place = source, _place(source)
    source = path_or_bytes(source, rule, name)
    if place is not None:
        given.seek(place)
    if isinstance(source, Path):
        name = f"{name} ({str(source)!r})"
        check_plain(source, name)
        try:
            with source.open("rb") as file:
                return _of_image(open_image(file, rule, name), rule, name)
        except (OSError, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{name}: cannot be read: {error}") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = open_image(bytes(source), rule, name)
    if isinstance(source, Image.Image):
        return _of_image(source, rule, name)
    if isinstance(source, (torch.Tensor, np.ndarray)):
        shape = channels_last(np.broadcast_to(np.uint8(0), tuple(source.shape)), rule, name).shape
        check_size(shape[0], shape[1], rule, name)
        return shape[0], shape[1]
    raise no_image(source, name)


def _place(source: Any) -> int | None:
    """Where an open file stands, so that it can be read again."""
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)) or not callable(getattr(source, "seek", None)):
        return None
    return int(source.tell())


def _of_image(image: Image.Image, rule: ReadRule, name: str) -> tuple[int, int]:
    width, height = image.size
    check_size(height, width, rule, name)
    try:
        # Pillow gives a TIFF's size turned already.
        turned = rule.upright and image.format != "TIFF" and _orientation(image) in _TURNED
    except Exception as error:  # Pillow's plug-ins raise whatever their parser meets
        raise ImageError(f"{name}: truncated or damaged: {type(error).__name__}: {error}") from error
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    file: IO[bytes] | None = getattr(image, "fp", None)
    if image.format == "PNG" and file is not None and not _has_late_chunks(file):
        return Image.Image.getexif(image).get(ORIENTATION, 1)  # PNG's own decodes, to look behind the pixels
    return image.getexif().get(ORIENTATION, 1)


def _has_late_chunks(file: IO[bytes]) -> bool:
    """Whether a PNG has chunks behind its pixels that may turn it."""
    place = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and pixels:
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(place)
