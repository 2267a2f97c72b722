"""A Hub on the loopback interface, as far as downloads go, and a client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CLIENT = """
import json, sys
from vlkit.hub.repository import resolve
{before}
found = []
for arguments in json.loads(sys.argv[1]):
    try:
        folder = resolve(**arguments)
        found.append({{"folder": str(folder), "files": sorted(p.name for p in folder.iterdir())}})
    except Exception as error:
        found.append({{"error": [c.__name__ for c in type(error).__mro__], "message": str(error)}})
print(json.dumps(found))
"""


@dataclass
class Repository:
    """Commits by hash, each a table of files, and branches.

    Attributes:
        gated: Status and error code that every request without the token gets.
        short: Bytes that are missing at the end of what is sent.
        drops: How often the connection breaks in the middle of a shard.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: tuple[int, str] | None = None
    token: str = "secret"
    short: int = 0
    drops: int = 0


@dataclass
class Hub:
    """What is served, and what was asked for."""

    repositories: dict[str, Repository]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    after: Callable[[str], None] = lambda path: None

    def fetch(
        self, cache: Path, *requests: dict[str, Any], before: str = "", env: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Call `resolve` once per request, in a new process whose Hub this is; what it returned or raised."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")
        }
        code = CLIENT.format(before=textwrap.dedent(before))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, json.dumps(requests)],
            env=inherited | settings | (env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found


@contextmanager
def serve(**repositories: Repository) -> Iterator[Hub]:
    """Serve repositories of the owner "lab"."""
    hub = Hub({f"lab/{name}": repository for name, repository in repositories.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(path)
            status, headers, data = self.found(path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and path.endswith(".safetensors") and self.breaks(path):
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(data)
            hub.after(path)

        def breaks(self, path: str) -> bool:
            """Whether the connection breaks here; counts down."""
            repository = hub.repositories["/".join(path.strip("/").split("/")[:2])]
            repository.drops -= 1
            return repository.drops >= 0

        def found(self, path: str) -> tuple[int, dict[str, str], bytes]:
            """Status, headers and body."""
            parts = path.strip("/").split("/")
            is_api = parts[0] == "api"
            name = "/".join(parts[2:4] if is_api else parts[:2])
            repository = hub.repositories.get(name)
            if repository is None:
                return 401, {"X-Error-Code": "RepoNotFound"}, b""
            if repository.gated and self.headers.get("Authorization") != f"Bearer {repository.token}":
                status, code = repository.gated
                return status, {"X-Error-Code": code} if code else {}, b""
            action, revision, *rest = parts[4:] if is_api else parts[2:]
            commit = repository.branches.get(revision, revision)
            files = repository.commits.get(commit)
            if files is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if is_api and action == "tree":
                tree = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in files.items()]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            if is_api:
                siblings = [{"rfilename": n, "size": len(d), "blobId": etag(d)} for n, d in files.items()]
                info = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
                return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
            data = files.get("/".join(rest))
            if data is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
            whole = len(data)
            data = data[: whole - repository.short]
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if span is None:
                return 200, headers, data
            start = int(span[1])
            hub.requests.append(f"{path} from byte {start}")
            return 206, headers | {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"}, data[start:]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
