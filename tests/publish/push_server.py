"""A local stand-in of the Hugging Face hub that takes commits to data sets: the requests that `huggingface_hub` makes for one.

Which those are was read off the log of the real client (huggingface_hub 2.4), with LFS in place of Xet. No request went to
huggingface.co. Its refusals have the texts that users and its own tests report: of `create` (community-events issue 25,
autotrain-advanced issue 766), of a token without the right to write (huggingface_hub issue 1182), of a token that is not valid
(huggingface_hub pull request 2847), of a commit in between (huggingface_hub's test of `parent_commit`). All other answers hold
what the client reads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_TOKEN = "hf_writes", "hf_reads"
OWNER = "team"
"""The only account under which the token may create data sets."""

Answer = tuple[int, dict[str, Any] | list[Any]]


@dataclass
class DataSet:
    """A data set: its files, and the messages of its commits. The head is a function of their number."""

    visibility: str
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.parquet filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class Hub:
    """Data sets by id. Change it between requests."""

    endpoint: str = ""
    datasets: dict[str, DataSet] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    status: int | None = None  # the answer to all requests
    moved_on: bool = False  # somebody commits before our commit arrives

    def answer(self, path: str, token: str, body: bytes) -> Answer:
        if self.status:
            return self.status, {"error": "out of order"}
        if path.startswith("/lfs/"):
            self.lfs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token not in (TOKEN, READ_TOKEN):
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(token, json.loads(body))
        found = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/.]+)(?:\.git)?(?:/(.+))?", path)
        if found is None or found[1] not in self.datasets:
            return 404, {"error": "Repository not found"}
        there = self.datasets[found[1]]
        match found[2]:
            case None:
                return 200, {"id": found[1], "sha": there.head, "private": there.visibility == "private"}
            case "paths-info/main":
                names = parse_qs(body.decode())["paths"]
                return 200, [self._entry(name, there.files[name]) for name in names if name in there.files]
            case "preupload/main":
                if token == READ_TOKEN:
                    return 403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"}
                files = [
                    {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return 200, {"files": files}
            case "info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                actions = [{"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}} for one in objects]
                return 200, {"objects": [one | {"actions": does} for one, does in zip(objects, actions, strict=True)]}
            case "commit/main":
                return self._commit(there, found[1], body)
        return 404, {"error": "no such page"}

    def _create(self, token: str, wanted: dict[str, Any]) -> Answer:
        repo = f"{wanted['organization']}/{wanted['name']}"
        assert wanted["type"] == "dataset"
        if token == READ_TOKEN or wanted["organization"] != OWNER:
            return 403, {"error": "You don't have the rights to create a dataset under this namespace"}
        if repo in self.datasets:
            return 409, {"error": "You already created this dataset repo", "url": f"{self.endpoint}/datasets/{repo}"}
        self.datasets[repo] = DataSet(wanted.get("visibility", "public"))
        return 200, {"url": f"{self.endpoint}/datasets/{repo}", "name": repo}

    def _commit(self, there: DataSet, repo: str, body: bytes) -> Answer:
        if self.moved_on:
            there.commits.append("by somebody else")
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if header["value"]["parentCommit"] != there.head:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        for change in changes:
            value = change["value"]
            is_lfs = change["key"] == "lfsFile"
            there.files[value["path"]] = self.lfs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
        there.commits.append(header["value"]["summary"])
        return 200, {"commitUrl": f"{self.endpoint}/datasets/{repo}/commit/{there.head}", "commitOid": there.head}

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": sha1}
        if _mode(path) == "lfs":
            sha256 = hashlib.sha256(content).hexdigest()
            entry |= {"oid": "0" * 40, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
        return entry


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".parquet") else "regular"


@contextlib.contextmanager
def push_server() -> Iterator[Hub]:
    """The stand-in on a port of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = hub.answer(unquote(urlsplit(self.path).path), token, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if isinstance(answer, dict) and "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
