"""Repositories of the Hub: one commit, only data, and errors that say which variable to set."""

from __future__ import annotations

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tests.hub.files import write_folder_of
from tests.hub.loopback import Repository, serve
from vlkit.errors import CheckpointError, DiskFullError
from vlkit.hub.checkpoint import open_checkpoint
from vlkit.hub.repository import resolve

FIRST, SECOND = "a" * 40, "b" * 40


def commit_of(folder: Path, value: float) -> dict[str, bytes]:
    """A repository of two shards, with files around them that must not be fetched."""
    write_folder_of(folder, {"a": torch.full((5,), value), "b": torch.full((5,), value)}, "20B")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    canaries = ["modeling.py", "sub/config.json", "sub/x.safetensors", "pytorch_model.bin", "consolidated.safetensors"]
    return files | {
        "config.json": json.dumps({"value": value}).encode(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        **dict.fromkeys(canaries, b"raise SystemExit('fetched')"),
    }


def repository(tmp_path: Path) -> Repository:
    commits = {FIRST: commit_of(tmp_path / "first", 1.0), SECOND: commit_of(tmp_path / "second", 2.0)}
    return Repository(commits, {"main": FIRST, "next": SECOND})


def values(folder: str) -> set[float]:
    checkpoint = open_checkpoint(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    return {config["value"], *(x for name in checkpoint.tensors for x in checkpoint.read(name).tolist())}


MODEL = {"repo_or_folder": "lab/model"}
IMPATIENT = "import time; time.sleep = lambda seconds: None"
SMALL_CHUNKS = "import huggingface_hub.constants as settings; settings.DOWNLOAD_CHUNK_SIZE = 16"  # bytes kept at once


def test_a_repository_is_fetched_once_and_then_found_offline(tmp_path: Path) -> None:
    small = MODEL | {"weights": False, "cache_dir": str(tmp_path / "small")}
    with serve(model=repository(tmp_path)) as hub:
        found, without_weights = hub.fetch(tmp_path / "home", MODEL, small)
        asked = list(hub.requests)

    assert values(found["folder"]) == {1.0}
    assert found["folder"].endswith(FIRST)
    assert not [path for path in asked if path.endswith((".py", ".bin")) or "sub/" in path or "consolidated" in path]
    assert without_weights["files"] == [
        "chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json"
    ]  # fmt: skip

    # The server is gone.
    offline = {"HF_HUB_OFFLINE": "1"}
    again, incomplete = hub.fetch(tmp_path / "home", MODEL, small | {"weights": True}, env=offline)
    assert again == found
    assert "HF_HUB_OFFLINE is set: unset it to download lab/model" in incomplete["message"]
    local = {"local_files_only": True}
    again, nothing = hub.fetch(tmp_path / "home", MODEL | local, {"repo_or_folder": "lab/nothing"} | local)
    assert again == found
    assert "local_files_only=True keeps it from being downloaded" in nothing["message"]


def test_all_files_are_of_one_commit_though_the_branch_moves(tmp_path: Path) -> None:
    with serve(model=repository(tmp_path)) as hub:

        def move(path: str) -> None:
            if path.endswith("/config.json"):
                hub.repositories["lab/model"].branches["main"] = SECOND

        hub.after = move
        first, later = hub.fetch(tmp_path / "home", MODEL, MODEL)

    assert values(first["folder"]) == {1.0}
    assert values(later["folder"]) == {2.0}


def test_a_branch_a_tag_or_a_commit_can_be_named(tmp_path: Path) -> None:
    published = repository(tmp_path)
    published.branches["refs/pr/1"] = published.branches["v1.0"] = SECOND  # tags and branches are asked for alike
    with serve(model=published) as hub:
        branch, tag, commit, nowhere = hub.fetch(
            tmp_path / "home", *(MODEL | {"revision": revision} for revision in ("next", "v1.0", FIRST, "nowhere"))
        )

    assert values(branch["folder"]) == {2.0}
    assert tag == branch
    assert values(commit["folder"]) == {1.0}
    assert "RevisionNotFoundError" in nowhere["error"]
    assert "revision=" in nowhere["message"]


def test_a_closed_repository_says_which_variable_to_set(tmp_path: Path) -> None:
    """Missing ones and closed ones look alike from outside; a token opens the closed ones."""
    gates = {"a": (401, "GatedRepo"), "b": (403, "GatedRepo"), "c": (403, ""), "d": (401, "RepoNotFound")}
    repositories = {name: repository(tmp_path / name) for name in gates}
    for name, gate in gates.items():
        repositories[name].gated = gate
    requests = [{"repo_or_folder": f"lab/{name}"} for name in gates]
    with serve(**repositories) as hub:
        *closed, nothing = hub.fetch(tmp_path / "home", *requests, {"repo_or_folder": "lab/nothing"})
        (by_variable, *_) = hub.fetch(tmp_path / "home", requests[0], env={"HF_TOKEN": "secret"})
        (by_argument, *_) = hub.fetch(tmp_path / "other", requests[1] | {"token": "secret"})

    for found in [*closed, nothing]:
        assert "OSError" in found["error"]
        assert "HF_TOKEN" in found["message"]
    assert "GatedRepoError" in closed[0]["error"]
    assert "RepositoryNotFoundError" in nothing["error"]
    assert "Check the name 'lab/nothing'" in nothing["message"]
    assert values(by_variable["folder"]) == values(by_argument["folder"]) == {1.0}


def test_without_a_connection_the_variables_are_named(tmp_path: Path) -> None:
    with serve() as hub:
        pass
    (found,) = hub.fetch(tmp_path / "home", MODEL)

    assert "OSError" in found["error"]
    assert "HF_ENDPOINT" in found["message"]
    assert "HF_HOME" in found["message"]


def test_a_download_that_does_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    full = """
        import shutil
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1000, 990, 10)
    """
    with serve(model=repository(tmp_path)) as hub:
        (found,) = hub.fetch(tmp_path / "home", MODEL, before=full)

    assert "DiskFullError" in found["error"]
    assert "downloading 2 files of lab/model needs" in found["message"]
    assert "has 10 " in found["message"]
    assert not [path for path in hub.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("number", "expected", "what"),
    [
        (errno.ENOSPC, DiskFullError, "no space left while downloading lab/model; set HF_HOME"),
        (errno.EROFS, CheckpointError, "cannot be downloaded to /cache/x: Read-only file system; set HF_HOME"),
        (errno.EACCES, CheckpointError, "cannot be downloaded to /cache/x: Permission denied; set HF_HOME"),
    ],
)
def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, number: int, expected: type[CheckpointError], what: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/cache/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=what):
        resolve("lab/model")


def test_two_processes_can_fill_one_cache(tmp_path: Path) -> None:
    with serve(model=repository(tmp_path)) as hub, ThreadPoolExecutor() as pool:
        (first,), (second,) = pool.map(lambda _: hub.fetch(tmp_path / "home", MODEL), range(2))

    assert first == second
    assert values(first["folder"]) == {1.0}


def test_a_file_that_arrives_short_is_never_used(tmp_path: Path) -> None:
    broken = repository(tmp_path)
    broken.short = 1
    with serve(model=broken) as hub:
        (found,) = hub.fetch(tmp_path / "home", MODEL)

    assert "OSError" in found["error"]
    assert not list((tmp_path / "home").rglob("snapshots/*/*"))


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    published = repository(tmp_path)
    published.drops = 1
    with serve(model=published) as hub:
        (found,) = hub.fetch(tmp_path / "home", MODEL, before=f"{IMPATIENT}\n{SMALL_CHUNKS}")

    assert values(found["folder"]) == {1.0}
    assert [path for path in hub.requests if re.search(r"safetensors from byte [1-9]", path)]


def test_a_connection_that_breaks_for_good_leaves_nothing_half(tmp_path: Path) -> None:
    """The next attempt fetches what is missing."""
    published = repository(tmp_path)
    published.drops = 99
    with serve(model=published) as hub:
        (found,) = hub.fetch(tmp_path / "home", MODEL, before=IMPATIENT)
        halves = list((tmp_path / "home").rglob("snapshots/*/*.safetensors"))
        published.drops = 0
        (later,) = hub.fetch(tmp_path / "home", MODEL)

    assert "CheckpointError" in found["error"]
    assert "the connection broke while downloading lab/model" in found["message"]
    assert not halves
    assert values(later["folder"]) == {1.0}


def test_pickled_weights_are_fetched_only_when_asked_for(tmp_path: Path) -> None:
    commit = {"config.json": b"{}", "pytorch_model.bin": b"pickled", "modeling.py": b"raise SystemExit"}
    with serve(model=Repository({FIRST: commit}, {"main": FIRST})) as hub:
        plain, asked = hub.fetch(tmp_path / "home", MODEL, MODEL | {"allow_pickle": True})

    assert plain["files"] == ["config.json"]
    assert asked["files"] == ["config.json", "pytorch_model.bin"]


def test_an_unsafe_name_in_a_published_index_is_not_asked_for(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../canary.safetensors"}}).encode()
    commit = {"config.json": b"{}", "model.safetensors.index.json": index}
    with serve(model=Repository({FIRST: commit}, {"main": FIRST})) as hub:
        (found,) = hub.fetch(tmp_path / "home", MODEL)

    assert "UnsafePathError" in found["error"]
    assert not [path for path in hub.requests if "canary" in path]


def test_a_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "a\\b", "", "-bad/name", "a--b/c"]
)
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and no repository name"):
        resolve(name)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the folder that holds it"):
        resolve(tmp_path / "model.safetensors")
