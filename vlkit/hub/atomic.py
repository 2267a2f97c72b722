"""Publishing a folder whole or not at all.

    write into a new hidden folder beside the target -> fsync -> exchange it with the target -> remove the old one

Whatever goes wrong before the exchange (an exception, a full disk, a killed process, a power cut) leaves the old folder
as it was. A killed process leaves its hidden folder `.<name>.<random>.partial` behind, which nobody reads and anybody
may delete. Where a file system cannot exchange two folders in one step (some network drives), the old one is moved
aside before: for an instant the target then has no name, and its contents lie in `.<name>.<random>.old`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from vlkit.errors import CheckpointError, DiskFullError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def write_folder(
    target: Path | str, write: Callable[[Path], object], *, replaces: Callable[[str], bool] = lambda name: False
) -> Path:
    """Publish what `write` writes, whole or not at all.

    An existing target is replaced. Its entries that the new folder does not have are kept, except those that `replaces`
    claims: shards of an older save must go, a person's notes must stay.

    Args:
        target: The folder. Its parents are made.
        write: Gets an empty folder to write into.
        replaces: Whether an entry of the old folder, given by name, belongs to what is replaced.

    Returns:
        The target, absolute, links followed.

    Raises:
        DiskFullError: No space was left; the old folder is whole.
        CheckpointError: The target is a file, cannot be written, or is the current folder; the old one is whole.
    """
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give the name of a folder")
    if target == Path.cwd() or os.path.ismount(target):
        raise CheckpointError(
            f"{target} is the current folder or a mount point and cannot be replaced; name a folder in it"
        )
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        write(partial)
        if target.exists():
            shutil.copymode(target, partial)
        _sync_tree(partial)
        old = _publish(partial, target)
    except BaseException as failure:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(failure, OSError) and not isinstance(failure, CheckpointError):
            raise _explained(failure, target) from failure
        raise
    if old is not None:
        _clear(old, target, replaces)
    sync(target.parent)
    return target


def check_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        DiskFullError: Fewer than `num_bytes` bytes are free; the message has both numbers.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFullError(
            f"{what} needs {num_bytes} bytes ({num_bytes / 1e9:.1f} GB), {folder} has {free} ({free / 1e9:.1f} GB) free"
        )


def _explained(failure: OSError, target: Path) -> CheckpointError:
    if failure.errno in NO_SPACE:
        parent = target.parent
        free = shutil.disk_usage(parent).free if parent.exists() else 0
        return DiskFullError(
            f"{target}: no space left while writing ({free} bytes free in {parent}); nothing was changed"
        )
    named = f" ({failure.filename})" if failure.filename else ""
    return CheckpointError(f"{target}: cannot be written: {failure.strerror or failure}{named}; nothing was changed")


def _publish(partial: Path, target: Path) -> Path | None:
    """Give the new folder its name. Returns where the old one is now."""
    if not target.exists():
        os.rename(partial, target)
        return None
    if _exchange(partial, target):
        return partial
    old = partial.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    return old


def _clear(old: Path, target: Path, replaces: Callable[[str], bool]) -> None:
    """Move to the new folder what it keeps of the old one, and remove the rest."""
    try:
        for entry in old.iterdir():
            if not replaces(entry.name) and not os.path.lexists(target / entry.name):
                os.rename(entry, target / entry.name)
        shutil.rmtree(old)
    except OSError as failure:
        raise CheckpointError(
            f"{target} is saved and whole, but what it replaced could not be cleared away ({failure}); it lies in {old}"
        ) from failure


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync(Path(root))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)
