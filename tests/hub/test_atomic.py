"""Publishing folders: the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlkit.errors import CheckpointError, DiskFullError
from vlkit.hub import atomic
from vlkit.hub.atomic import check_space, write_folder


def put(**files: str):  # type: ignore[no-untyped-def]
    """A writer of these files; `a_json` is written as a.json."""

    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)

    return write


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_new_folder_is_published_with_its_parents(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "runs" / "best", put(config_json="1"))

    assert contents(target) == {"config.json": "1"}
    assert os.listdir(tmp_path / "runs") == ["best"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_folder_is_replaced_and_foreign_files_stay(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target = tmp_path / "model"
    write_folder(target, put(config_json="old", shard_1="old", shard_2="old"))
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("mine")
    (target / "README.md").write_text("mine")

    write_folder(target, put(config_json="new", shard_1="new"), replaces=lambda name: name.startswith("shard"))

    assert contents(target) == {"config.json": "new", "shard.1": "new", "README.md": "mine"}
    assert (target / "notes" / "mine.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_a_failed_save_leaves_the_old_folder_whole_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model"
    write_folder(target, put(config_json="old"))

    def fail(folder: Path) -> None:
        put(config_json="half")(folder)
        raise failure

    expected = CheckpointError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_folder(target, fail)

    assert contents(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_folder(target, put(config_json="old"))
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    rename = os.rename

    def fail_on_publish(source: Path, to: Path) -> None:
        if Path(source).suffix == ".partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail_on_publish)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        write_folder(target, put(config_json="new"))

    assert contents(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["model"]


def test_an_old_folder_that_cannot_be_cleared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_folder(target, put(config_json="old"))

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.shutil, "rmtree", fail)
    with pytest.raises(CheckpointError, match=r"is saved and whole.*\.model\.[0-9a-f]+\.partial"):
        write_folder(target, put(config_json="new"))

    assert contents(target) == {"config.json": "new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_the_old_folder(tmp_path: Path, number: int) -> None:
    target = tmp_path / "model"
    write_folder(target, put(config_json="old"))

    def fill(folder: Path) -> None:
        put(config_json="half")(folder)
        raise OSError(number, os.strerror(number))

    with pytest.raises(DiskFullError, match="no space left"):
        write_folder(target, fill)

    assert contents(target) == {"config.json": "old"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_during_a_save_sees_the_old_folder_or_the_new_one(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files opened before the exchange stay the old ones; a folder read at once after it is wholly new."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target = tmp_path / "model"
    write_folder(target, put(one="old", two="old"))

    def write(folder: Path) -> None:
        put(one="new")(folder)
        assert contents(target) == {"one": "old", "two": "old"}  # in the middle of the save
        put(two="new")(folder)

    with (target / "one").open() as before:
        write_folder(target, write, replaces=lambda name: True)
        assert before.read() == "old"
    assert contents(target) == {"one": "new", "two": "new"}


def test_a_killed_save_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(target, put(config_json="old"))
    code = """
        import os, signal, sys
        from pathlib import Path
        from vlkit.hub.atomic import write_folder
        def write(folder):
            (folder / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        write_folder(Path(sys.argv[1]), write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False)

    assert done.returncode == -signal.SIGKILL
    assert contents(target) == {"config.json": "old"}
    left = [path.name for path in tmp_path.iterdir() if path.name != "model"]
    assert len(left) == 1
    assert left[0].startswith(".model.")
    write_folder(target, put(config_json="new"))  # what was left behind is in nobody's way
    assert contents(target) == {"config.json": "new"}


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is synced, then the folder is renamed, then its parent is synced."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_sync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[0])
        fsync(handle)

    def logged_rename(source: Path, to: Path) -> None:
        events.append("rename")
        rename(source, to)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "rename", logged_rename)

    write_folder(tmp_path / "model", put(one="1", two="2"))

    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before) == ["sync ", "sync one", "sync two"]  # the hidden folder's name begins with a dot
    assert after == [f"sync {tmp_path.name}"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        target = write_folder(tmp_path / "model", put(config_json="1"))
    finally:
        os.umask(before)

    assert (target / "config.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_mode_of_an_old_folder_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir(mode=0o750)
    target.chmod(0o2770)

    write_folder(target, put(config_json="1"))

    assert target.stat().st_mode & 0o7777 == 0o2770


def test_a_target_that_is_a_file_or_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        write_folder(tmp_path / "file", put(a="1"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_folder(tmp_path / "file" / "below", put(a="1"))
    assert (tmp_path / "file").read_text() == "mine"

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="current folder"):
        write_folder(".", put(a="1"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            write_folder(tmp_path / "model", put(a="1"))
    finally:
        tmp_path.chmod(0o700)


def test_a_permission_error_becomes_a_checkpoint_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(CheckpointError, match=r"model: cannot be written: Permission denied"):
        write_folder(tmp_path / "model", put(a="1"))


def test_a_linked_target_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")

    assert write_folder(tmp_path / "model", put(a="1")) == tmp_path / "disk"

    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "model") == {"a": "1"}


def test_free_space_is_checked_with_both_numbers(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", 1, "saving")
    with pytest.raises(DiskFullError, match=r"saving needs 1000000000000000000 bytes .* has \d+ "):
        check_space(tmp_path / "not" / "there", 10**18, "saving")
