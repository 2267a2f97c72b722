"""Checkpoints of a run: everything that the next step needs, published whole or not at all.

    checkpoints/step-00000010/      model/ and optimizer/ (shards of all ranks), state.json, manifest.json
    checkpoints/LATEST              name of the newest, for people and scripts

    write into a new hidden folder -> sync -> manifest.json, the mark that all is there -> rename -> LATEST -> remove old ones

Whatever goes wrong before the rename leaves the older checkpoints as they were, and a hidden folder at most, which the next
save removes. A published checkpoint is never written to again. Renaming has to be one step for all readers, as it is on local
disks; on a network drive, ranks on other hosts may see the new name a little later, so all wait for the first one's word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vlkit.errors import CheckpointError, CorruptCheckpointError, DiskFullError
from vlkit.hub.atomic import NO_SPACE, check_space, sync
from vlkit.hub.strict_json import read_json
from vlkit.optim import Muon
from vlkit.optim.agree import broadcast_json, gather_json, raise_together, rank_in
from vlkit.optim.parts import Part, is_dtensor, pieces_of
from vlkit.training.sharded_files import load_shards, save_shards

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST, STATE, LATEST, LOCK = "manifest.json", "state.json", "LATEST", ".lock"
SMALL = 2**20  # bytes up to which the manifest has a file's SHA-256; shards have checksums of their own
SPARE = 2**16  # bytes for the small files
VERSION = 1
_PUBLISHED = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\..*\.partial")


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if it is not there, so that no second run works in it.

    The lock is the system's own on a file `.lock` that names its holder, and ends with the process however that ends. File
    systems without locks go without.

    Raises:
        CheckpointError: Another run works in the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _explained(error, folder) from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"{folder}: another run is at work here, {file.read().strip() or 'which does not say its name'}; wait for "
                "its end, or give this run another folder with `run`"
            ) from None
        except OSError:
            pass  # no locks here
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Muon,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Collective. Publish the state after a step.

    Args:
        folder: Holds all checkpoints of the run.
        step: Steps done.
        model: Its parameters and persistent buffers are saved.
        optimizer: Its state is saved.
        state: All else, as JSON.
        keep: How many of the newest stay.
        group: The ranks; None is one process.

    Returns:
        The new checkpoint.

    Raises:
        DiskFullError: Not enough space; the older checkpoints are whole, and nothing of the new one is left.
        CheckpointError: It exists already, or the folder cannot be written. What fails on one rank is raised on all.
    """
    first = rank_in(group) == 0
    target = folder / checkpoint_name(step)
    tensors = {"optimizer": optimizer.sharded_state_dict(), "model": model_tensors(model)}
    needed = sum(gather_json(_num_bytes(tensors, first), group)) + SPARE
    name = broadcast_json(f".{target.name}.{secrets.token_hex(4)}.partial", group)
    partial = folder / name
    try:
        with _together(folder, group):
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                remove_orphans(folder)
                check_space(folder, needed, f"{target.name} in {folder}")
                if target.exists():
                    raise CheckpointError(f"{target} exists already, and what is published is never written to again")
                partial.mkdir()
        for part, held in tensors.items():
            save_shards(partial / part, held, group)
        with _together(folder, group):
            if first:
                _write(partial / STATE, dict(state))
                _write(partial / MANIFEST, {"version": VERSION, "step": step, "files": _listed(partial)})
                sync(partial)
                os.rename(partial, target)
                sync(folder)
    except BaseException as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, DiskFullError) and str(needed) not in str(error):
            raise DiskFullError(f"{error}; {target.name} needs {needed} bytes, nothing of it is left") from error
        raise
    if first:
        # It is saved. What follows is tidying, and no reason to stop.
        with contextlib.suppress(OSError):
            hidden = folder / f".{LATEST}.partial"
            hidden.write_text(target.name + "\n", encoding="utf-8")
            os.replace(hidden, folder / LATEST)
            _remove_old(folder, keep)
    return target


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Muon, *, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Collective. Fill model and optimizer, which may be spread over other ranks than those that saved; the optimizer first.

    The optimizer's options stay what they are: the config decides them.

    Returns:
        The state that was saved beside them.

    Raises:
        CorruptCheckpointError: A file is damaged.
        OptimizerStateError: The state is not finite.
        KeyMismatchError: It is of another model or optimizer.
    """
    options = [{key: value for key, value in own.items() if key != "params"} for own in optimizer.param_groups]
    tensors = optimizer.sharded_state_dict()
    load_shards(path / "optimizer", tensors, group)
    optimizer.load_sharded_state_dict(tensors)
    for own, kept in zip(optimizer.param_groups, options, strict=True):
        own.update(kept)
    optimizer.check_options()
    load_shards(path / "model", model_tensors(model), group)
    return read_json(path / STATE, error=CorruptCheckpointError)


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors."""
    return read_json(path / STATE, error=CorruptCheckpointError)


def complete_checkpoints(folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints in which no file is missing or changed, newest first; and of the others, name and reason."""
    complete, skipped = [], []
    for path in published(folder):
        try:
            check_complete(path)
            complete.append(path)
        except CheckpointError as error:
            skipped.append(f"{path.name} is skipped: {error}")
    return complete, skipped


def published(folder: Path) -> list[Path]:
    """All folders with the name of a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _PUBLISHED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def check_complete(path: Path) -> None:
    """Compare a checkpoint with its manifest: its step, names and sizes of all files, and the contents of small ones.

    Raises:
        CorruptCheckpointError: No manifest, one of another step, or a file that is missing or has changed.
    """
    if not (path / MANIFEST).is_file():
        raise CorruptCheckpointError(f"{path}: no {MANIFEST}, so it was never finished")
    manifest = read_json(path / MANIFEST, error=CorruptCheckpointError)
    if manifest.get("version") != VERSION or not isinstance(manifest.get("files"), list):
        raise CorruptCheckpointError(
            f"{path / MANIFEST}: version {manifest.get('version')!r}, this release reads {VERSION}"
        )
    step = manifest.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or path.name != checkpoint_name(step):
        raise CorruptCheckpointError(
            f"{path}: {MANIFEST} is of step {step!r}, and the folder has the name of another; give it back its own name"
        )
    for entry in manifest["files"]:
        try:
            name, size, digest = str(entry["name"]), int(entry["bytes"]), entry.get("sha256")
        except (TypeError, KeyError, ValueError, AttributeError):
            raise CorruptCheckpointError(f"{path / MANIFEST}: an entry cannot be understood: {entry!r}") from None
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            raise CorruptCheckpointError(f"{file}: missing; {MANIFEST} lists it with {size} bytes")
        if (found := file.stat().st_size) != size:
            raise CorruptCheckpointError(f"{file}: {found} bytes, {MANIFEST} says {size}")
        if digest is not None and _sha256(file) != digest:
            raise CorruptCheckpointError(f"{file}: the contents have changed since it was saved")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def remove_orphans(folder: Path) -> None:
    """Remove what interrupted saves and removals left."""
    for path in folder.iterdir():
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, shared ones once, and persistent buffers, such as the selection bias of routers."""
    parameters = dict(model.named_parameters())
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: value for name, value in model.state_dict().items() if name not in again}


def _num_bytes(tensors: Mapping[str, Mapping[str, Tensor | Part]], first: bool) -> int:
    """What a rank is going to write, about: of plain tensors, which all ranks have, the first counts all."""
    held = (each for part in tensors.values() for each in part.values())
    return sum(view.nbytes for each in held if first or not _is_plain(each) for _, view in pieces_of(each))


def _is_plain(tensor: Tensor | Part) -> bool:
    return isinstance(tensor, Tensor) and not is_dtensor(tensor)


@contextlib.contextmanager
def _together(folder: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    failure: Exception | None = None
    try:
        yield
    except CheckpointError as error:
        failure = error
    except OSError as error:
        failure = _explained(error, folder)
    raise_together(failure, group)


def _explained(error: OSError, folder: Path) -> CheckpointError:
    if error.errno in NO_SPACE:
        return DiskFullError(f"{folder}: no space left while saving; the older checkpoints are whole")
    if isinstance(error, FileExistsError | NotADirectoryError) and not folder.is_dir():
        return CheckpointError(
            f"{folder}: there is a file where a folder is needed; give the run another one with `run`"
        )
    named = f" ({error.filename})" if error.filename else ""
    return CheckpointError(f"{folder}: cannot be written: {error.strerror or error}{named}")


def _listed(folder: Path) -> list[dict[str, Any]]:
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        entry: dict[str, Any] = {"name": path.relative_to(folder).as_posix(), "bytes": size}
        if size <= SMALL:
            entry["sha256"] = _sha256(path)
        entries.append(entry)
    return entries


def _remove_old(folder: Path, keep: int) -> None:
    """Remove complete checkpoints but for the newest; hidden first, so that none is ever seen half removed."""
    complete, _ = complete_checkpoints(folder)
    for path in complete[keep:]:
        hidden = folder / f".{path.name}.{secrets.token_hex(4)}.partial"
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(values, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
