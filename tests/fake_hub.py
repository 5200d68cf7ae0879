"""A Hugging Face hub of our own, on loopback: enough of its protocol to fetch, resume and push files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def commit_of(revision: str) -> str:
    """The commit that a branch or tag points at, here a function of its name."""
    return hashlib.sha1(revision.encode()).hexdigest()


class FakeHub:
    """The server and what it holds.

    Attributes:
        files: content by (repository, revision, path).
        private: repositories that were made so.
        requests: every request as (method, path, value of the Range header), in order.
        cut_after: if set, the next GET of a file is cut off after this many bytes.
        address: its URL.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        self.address = ""

    def add(self, repo: str, path: str, content: bytes, revision: str = "main") -> None:
        """Put a file in a repository."""
        self.files[repo, revision, path] = content

    def gets(self) -> list[str | None]:
        """The Range headers of all GETs of file content."""
        return [span for method, path, span in self.requests if method == "GET" and "/resolve/" in path]

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables that make huggingface-hub talk to this server and keep its files in `cache`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_of_the_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that listens on a free port of the loopback interface while the block runs."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def do_PUT(self) -> None:
        content = self._receive()
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = content
        self._json({})

    def do_POST(self) -> None:
        content = self._receive()
        self.hub.requests.append(("POST", self.path, None))
        if self.path == "/api/repos/create":
            wanted = json.loads(content)
            repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
            self._json({"url": f"{self.hub.address}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = {path: "lfs" if path.endswith("safetensors") else "regular" for path in paths}
            answer = [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]
            self._json({"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [
                {**item, "actions": {"upload": {"href": f"{self.hub.address}/upload/{item['oid']}"}}}
                for item in json.loads(content)["objects"]
            ]})  # fmt: skip
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            self._commit(match[1], match[2], content)
        else:
            self._error(404, None)

    def _commit(self, repo: str, revision: str, content: bytes) -> None:
        for line in content.decode().splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                self.hub.add(repo, value["path"], base64.b64decode(value["content"]), revision)
            elif record["key"] == "lfsFile":
                self.hub.add(repo, value["path"], self.hub.uploads[value["oid"]], revision)
        commit = commit_of(revision)
        address = f"{self.hub.address}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address})

    def _file(self, body: bool) -> None:
        span = self.headers.get("Range")
        self.hub.requests.append((self.command, self.path, span))
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if match is None:
            self._error(404, None)
            return
        repo, revision, path = match.groups()
        revision = next((key[1] for key in self.hub.files if commit_of(key[1]) == revision), revision)
        if all(key[0] != repo for key in self.hub.files):
            self._error(404, "RepoNotFound")
        elif all(key[:2] != (repo, revision) for key in self.hub.files):
            self._error(404, "RevisionNotFound")
        elif (repo, revision, path) not in self.hub.files:
            self._error(404, "EntryNotFound")
        else:
            self._content(self.hub.files[repo, revision, path], commit_of(revision), span, body)

    def _content(self, content: bytes, commit: str, span: str | None, body: bool) -> None:
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        cut, self.hub.cut_after = self.hub.cut_after, None
        if cut is None:
            self.wfile.write(content[start:])
        else:
            self.wfile.write(content[start : start + cut])
            self.close_connection = True

    def _error(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _receive(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
