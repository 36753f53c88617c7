"""A model hub on this machine: the few endpoints that huggingface_hub asks when it fetches a snapshot, over HTTP, from
folders on the disk; and what was asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class Hub:
    """``models`` are folders by name; ``revisions`` commits by branch or tag, of every model; ``gated`` names models
    whose files nobody may have. ``asked`` lists method and path of every request."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.revisions = {"main": COMMIT, "v1": OTHER_COMMIT}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def fetched(self, name: str) -> list[str]:
        """Return the files of a model whose content was asked for."""
        marks = [f"/{name}/resolve/{commit}/" for commit in self.revisions.values()]
        return sorted(
            path.removeprefix(mark)
            for method, path in self.asked
            for mark in marks
            if method == "GET" and path.startswith(mark)
        )


@contextmanager
def serving(models: dict[str, Path]) -> Iterator[Hub]:
    """Serve the models until the block ends."""
    hub = Hub(models)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.served.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.served.models.get(name)
        if folder is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
            return
        commit = self._commit(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision Not Found"})
        elif path.startswith("/api/") and rest[:1] == ["tree"]:
            self._json(
                [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _hash(f)}
                    for f in sorted(folder.rglob("*"))
                    if f.is_file()
                ]
            )
        elif path.startswith("/api/"):
            self._json({"id": name, "sha": commit, "siblings": []})
        elif name in self.served.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            self._file(folder / "/".join(rest[2:]), commit)

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.served.revisions.values() else self.served.revisions.get(revision)

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self._send(200, file.read_bytes(), {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": commit})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
