"""File names that come out of a checkpoint: plain names in its own folder, or an error before anything is opened.

The Hub's cache keeps a snapshot as links to blobs of the same repository; only those links may leave the folder:

    models--owner--name/snapshots/<commit>/model.safetensors -> models--owner--name/blobs/<hash>
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from vlkit.errors import CheckpointError, UnsafePathError


def check_name(name: object, where: str, *, suffixes: tuple[str, ...] = ()) -> str:
    """The name, if it is a plain file name.

    Args:
        name: What the checkpoint says.
        where: Where it says so, for messages.
        suffixes: Allowed ends of the name; empty for any.

    Raises:
        UnsafePathError: A path, a drive, an empty name, control characters, or another suffix.
    """
    if not isinstance(name, str) or not name:
        raise UnsafePathError(f"{where}: expected a file name, found {name!r}")
    if name in (".", "..") or re.search(r"[/\\:\x00-\x1f]", name) or name != name.strip():
        raise UnsafePathError(
            f"{where}: {name!r} is not a plain file name; files of a checkpoint lie in its own folder"
        )
    if suffixes and not name.endswith(suffixes):
        raise UnsafePathError(f"{where}: {name!r} does not end with {' or '.join(suffixes)}")
    return name


def safe_file(folder: Path, name: str) -> Path:
    """The real path of a file in a checkpoint folder.

    Raises:
        UnsafePathError: The name is no plain file name, or a link that leaves the folder.
        CheckpointError: There is no such file, or it is no regular file.
    """
    check_name(name, str(folder))
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError as missing:
        dangling = " (a link to a file that is gone; download it again)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: no such file{dangling}") from missing
    except (OSError, RuntimeError) as failure:
        raise CheckpointError(f"{path}: cannot be read: {failure}") from failure
    if not _belongs(real, folder):
        raise UnsafePathError(f"{path} is a link to {real}, outside of the checkpoint; replace it by the file itself")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return real


def _belongs(real: Path, folder: Path) -> bool:
    home = folder.resolve()
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent  # .../models--owner--name, where home is .../snapshots/<commit>
    return home.parent.name == "snapshots" and real.parent == repository / "blobs"
