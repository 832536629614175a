"""A local stand-in of the Hugging Face hub: the requests that `huggingface_hub` and `datasets` make for data sets, no others.

Which those are was read off the log of the real clients (huggingface_hub 2.4, datasets 5.2). No request went to huggingface.co.
Its answers to these cases are published: a renamed repository (307 to a path), an unknown revision, a gated one (its info is
public, its files are 401 `GatedRepo` without a token), a token that is not valid (huggingface_hub pull request 2847). A missing
repository is 401 without an error code, which the client understands over https alone; so the code stands here. All other
answers hold what the client reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, NEXT_COMMIT = "a" * 40, "b" * 40
EXPIRED = "hf_expired"
"""A token that is not valid: the hub refuses it for public data sets too."""


@dataclass
class Hub:
    """Data sets by id, each a list of files by commit; `main` is the last commit. Change it between requests."""

    endpoint: str = ""
    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # opens gated data sets
    down: bool = False

    def answer(self, target: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(target).path)
        if self.down:
            return 503, {}, b""
        if token == f"Bearer {EXPIRED}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        found = re.fullmatch(
            r"/(?P<api>api/)?datasets/(?P<repo>[\w.-]+/[\w.-]+?|[\w.-]+?)"
            r"(/(?P<what>revision|tree|paths-info|resolve)/(?P<revision>refs/[^/]+/[^/]+|[^/]+)(/(?P<path>.*))?)?",
            path,
        )
        if found is None:
            return 404, {}, b""
        repo = found["repo"]
        if repo in self.renamed:
            return 307, {"Location": target.replace(repo, self.renamed[repo])}, b""
        if repo not in self.datasets:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commits = self.datasets[repo]
        revision = found["revision"] or "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = commits[commit]
        if found["api"] and found["what"] in (None, "revision"):
            info = {"_id": "0", "id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {}, json.dumps(info).encode()
        if found["api"] and found["what"] == "tree":
            return self._tree(files, found["path"] or "", recursive="recursive=true" in target)
        if found["what"] != "resolve":
            return 404, {}, b""
        if repo in self.gated and token != f"Bearer {self.token}":
            return 401 if token is None else 403, {"X-Error-Code": "GatedRepo"}, b""
        if found["path"] not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = files[found["path"]]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def _tree(self, files: dict[str, bytes], path: str, recursive: bool) -> tuple[int, dict[str, str], bytes]:
        prefix = f"{path}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            parts = name.removeprefix(prefix).split("/")
            if name.startswith(prefix):
                for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                    folder = prefix + "/".join(parts[:depth])
                    entries[folder] = {"type": "directory", "size": 0, "oid": folder, "path": folder}
                if recursive or len(parts) == 1:
                    oid = hashlib.sha1(content).hexdigest()
                    entries[name] = {"type": "file", "size": len(content), "oid": oid, "path": name}
        if not entries:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {}, json.dumps(list(entries.values())).encode()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            status, headers, content = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
