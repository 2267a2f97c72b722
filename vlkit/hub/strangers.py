"""Files that are often found where weights should be, recognised by their first bytes."""

from __future__ import annotations

_SIGNS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` in the repository, or download the file again"),
    (b"oid sha256:", "a Git LFS pointer: run `git lfs pull` in the repository, or download the file again"),
    (
        b"<!doctype html",
        "an HTML page, probably an error or a login page saved under this name: download the file again",
    ),
    (b"<html", "an HTML page, probably an error or a login page saved under this name: download the file again"),
    (b"<?xml", "an XML page, probably an error message saved under this name: download the file again"),
    (b"pk\x03\x04", "a zip archive, perhaps PyTorch's pickle format under another name"),
    (b"\x80\x02", "a Python pickle under another name"),
    (b"gguf", "a GGUF file, another format of weights"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)


def stranger(head: bytes) -> str:
    """What a file is, judged by its first bytes, with what to do; empty if it is nothing known."""
    if not head:
        return "an empty file: download it again"
    start = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((text for sign, text in _SIGNS if start.startswith(sign)), "")
