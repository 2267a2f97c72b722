"""Where a checkpoint's files come from: a folder, or a repository of the Hub, pinned to one commit.

    resolve("runs/step-1000")          -> that folder
    resolve("owner/name")              -> the snapshot of one commit in the Hub's cache; what is missing is downloaded
    resolve("owner/name", weights=False)   without weights: configs, tokenizer, templates

Only data is fetched: JSON, templates, tokenizer files, safetensors. Never Python files; pickled weights only if asked
for. The Hub client's settings hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS. Its
errors pass through with a hint at the end of their message.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from pathlib import Path
from typing import NoReturn

from vlkit.errors import CheckpointError, DiskFullError
from vlkit.hub.atomic import NO_SPACE, check_space
from vlkit.hub.index import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, shards_of

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_SUBFOLDERS = "*/*"


def resolve(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
    allow_pickle: bool = False,
) -> Path:
    """The folder that holds the files of a checkpoint.

    Args:
        repo_or_folder: An existing folder, which is returned as it is, or `owner/name` on the Hub.
        revision: Branch, tag or commit on the Hub; all files are of the one commit that it means now.
        cache_dir: Where the Hub client keeps its files; by default $HF_HOME/hub.
        token: For private and gated repositories; by default what the Hub client knows.
        local_files_only: Use the cache alone.
        weights: Also fetch the weights.
        allow_pickle: Fetch `pytorch_model*.bin` where the repository has no safetensors.

    Raises:
        CheckpointError: No such folder, and no name of a repository; or a connection that breaks for good. Nothing that is half
            downloaded is ever used.
        DiskFullError: The weights do not fit into the cache. Where the Hub says how large they are, nothing was downloaded.
        OSError: What the Hub client raises: no such repository or revision, no access, no connection.
    """
    if not isinstance(repo_or_folder, str | os.PathLike):
        raise CheckpointError(f"expected a folder or 'owner/name', found {type(repo_or_folder).__name__}")
    name = os.fspath(repo_or_folder)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds it")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name or not name.strip():
        raise CheckpointError(f"{name!r}: no such folder, and no repository name of the form 'owner/name'")

    from huggingface_hub import snapshot_download

    def fetch(commit: str | None, patterns: list[str]) -> Path:
        found = snapshot_download(
            name,
            revision=commit,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=patterns,
            ignore_patterns=[_SUBFOLDERS, "*.py"],
        )
        return Path(found)

    try:
        folder = fetch(revision, list(SMALL_FILES))
        if weights:
            for patterns in _weight_patterns(folder, allow_pickle):
                if not local_files_only:
                    _check_download(name, folder, patterns, token)
                fetch(folder.name, patterns)  # the commit, so that a branch that moves meanwhile changes nothing
                if any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns for entry in folder.iterdir()):
                    break
    except CheckpointError:
        raise
    except (OSError, ValueError) as failure:
        _explain(name, failure, local_files_only)
    except Exception as failure:
        if not type(failure).__module__.startswith(("httpx", "httpcore")):  # the errors of the Hub client's transport
            raise
        raise CheckpointError(
            f"the connection broke while downloading {name}: {failure or type(failure).__name__}; call it again, the files that "
            "are whole are kept. Behind a proxy or a mirror, set HTTPS_PROXY or HF_ENDPOINT"
        ) from failure
    return folder


def _weight_patterns(folder: Path, allow_pickle: bool) -> list[list[str]]:
    """Patterns of the files with weights, best first; the first that the repository has is taken."""
    if (folder / INDEX).exists():
        return [shards_of(folder, INDEX)]
    choices = [[WEIGHTS], ["*.safetensors"]]
    if allow_pickle:
        choices.append(shards_of(folder, PICKLE_INDEX) if (folder / PICKLE_INDEX).exists() else [PICKLE])
    return choices


def _check_download(name: str, folder: Path, patterns: list[str], token: str | bool | None) -> None:
    """Refuse a download that does not fit, where the Hub says how large it is."""
    from huggingface_hub import HfApi

    wanted = [pattern for pattern in patterns if not (folder / pattern).exists()]
    if not wanted:
        return
    try:
        info = HfApi(token=token).model_info(name, revision=folder.name, files_metadata=True)
    except Exception:  # whatever hinders this question hinders the download too, which has the better message
        return
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in wanted)
        and not (folder / file.rfilename).exists()
    }
    check_space(folder, sum(sizes.values()), f"downloading {len(sizes)} files of {name}")


def _explain(name: str, failure: OSError | ValueError, local_files_only: bool) -> NoReturn:
    """Raise the Hub client's error again, with what to do at the end of its message."""
    from huggingface_hub import constants, errors

    hint = ""
    answer = getattr(failure, "response", None) or getattr(failure.__cause__, "response", None)
    status = getattr(answer, "status_code", None)
    if isinstance(failure, errors.GatedRepoError) or status == 403:
        hint = f"Ask for access on the page of {name}, then set HF_TOKEN (or pass token=) to a token of that account."
    elif isinstance(failure, errors.RevisionNotFoundError):
        hint = "Check revision=: it is a branch, a tag or a commit of the repository."
    elif isinstance(failure, errors.RepositoryNotFoundError) or status == 401:
        hint = f"Check the name {name!r}; if it is private or gated, set HF_TOKEN (or pass token=)."
    elif isinstance(failure, errors.LocalEntryNotFoundError):
        if local_files_only:
            way = "local_files_only=True keeps it from being downloaded: leave it out"
        elif constants.HF_HUB_OFFLINE:
            way = "HF_HUB_OFFLINE is set: unset it"
        else:
            way = "Set HF_ENDPOINT to a mirror that can be reached"
        hint = f"{way} to download {name}, or set HF_HOME (or cache_dir=) to a cache that has it."
    elif isinstance(failure, errors.HFValidationError):
        raise CheckpointError(f"{name!r}: no such folder, and no repository name of the form 'owner/name'") from failure
    elif getattr(failure, "errno", None) in NO_SPACE:
        raise DiskFullError(
            f"no space left while downloading {name}; set HF_HOME (or cache_dir=) to a larger disk"
        ) from failure
    elif isinstance(failure, OSError) and failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise CheckpointError(
            f"{name} cannot be downloaded to {failure.filename or 'the cache'}: {failure.strerror}; set HF_HOME (or cache_dir=) "
            f"to a folder that can be written"
        ) from failure
    if hint:
        failure.args = (f"{failure}\n{hint}", *failure.args[1:])
    raise failure
