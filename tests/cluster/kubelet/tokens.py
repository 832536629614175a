"""A pod's service-account token: asked for at the TokenRequest API, renewed in time, mounted where clients look for it.

Knows nothing of what the token may do.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.cluster.kubelet.mirror import Api, Refused, Thing, uid_of

MOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
"""A constant of every client: no environment variable points elsewhere."""

# In a mount namespace of its own; the tmpfs leaves the machine's folders as they are.
BIND = f"""set -e
run=$(readlink -f /var/run)
mount -t tmpfs rig "$run"
mkdir -p {MOUNT_PATH}
mount --bind "$1" {MOUNT_PATH}
shift
exec "$@"
"""


@dataclass
class _Held:
    """A token in a file of a running pod."""

    pod: Thing
    source: Thing
    renew_at: float  # monotonic


class Tokens:
    """Tokens of the pods of some nodes.

    Args:
        life_share: a token is renewed when this share of its life is over, as a kubelet does it.
    """

    def __init__(self, api: Api, life_share: float = 0.8) -> None:
        self._api, self._life_share = api, life_share
        self._held: dict[Path, _Held] = {}
        self._lock = threading.Lock()

    def request(self, pod: Thing, source: Thing) -> tuple[str, float]:
        """A token bound to the pod, and after how many seconds to renew it. `source` is the volume's serviceAccountToken."""
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        account = pod["spec"].get("serviceAccountName") or "default"
        bound = {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid_of(pod)}
        spec: Thing = {"expirationSeconds": source.get("expirationSeconds", 3600), "boundObjectRef": bound}
        spec["audiences"] = [source["audience"]] if source.get("audience") else []
        answer = self._api.ask(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
        )
        ends = datetime.fromisoformat(answer["status"]["expirationTimestamp"]).timestamp()
        return str(answer["status"]["token"]), (ends - time.time()) * self._life_share

    def write(self, path: Path, pod: Thing, source: Thing) -> None:
        """Put a new token into a file of a pod's volume, and remember to renew it."""
        token, seconds = self.request(pod, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"..{path.name}")
        beside.write_text(token)
        beside.replace(path)  # no reader meets half a token
        with self._lock:
            self._held[path] = _Held(pod, source, time.monotonic() + seconds)

    def renew(self, pod: Thing) -> float | None:
        """Renew what is due of a pod; seconds until the next is due, None where it has no token."""
        with self._lock:
            held = {path: token for path, token in self._held.items() if uid_of(token.pod) == uid_of(pod)}
        for path, token in held.items():
            if time.monotonic() >= token.renew_at:
                self.write(path, pod, token.source)
        with self._lock:
            due = [self._held[path].renew_at for path in held]
        return max(min(due) - time.monotonic(), 0.01) if due else None

    def forget(self, pod_uid: str) -> None:
        with self._lock:
            self._held = {path: token for path, token in self._held.items() if uid_of(token.pod) != pod_uid}


def files_of(source: Thing, pod: Thing, volume: Path, tokens: Tokens | None) -> None:
    """Write a projected volume's token. Without `tokens` the file is empty: no worker of ours may use one."""
    path = volume / source["path"]
    if tokens is None:
        path.write_bytes(b"")
        return
    try:
        tokens.write(path, pod, source)
    except Refused as refusal:
        if refusal.status != 404:  # the account is gone
            raise


def mounted(command: list[str], folder: Path) -> list[str]:
    """`command` in a mount namespace where `folder` lies at MOUNT_PATH. Its process keeps its id."""
    return [*_unshare(), "sh", "-c", BIND, "sh", str(folder), *command]


@functools.cache
def why_no_mounts() -> str:
    """Why nothing can be mounted for one process alone; empty where it can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare` on this machine"
    tried = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
    return f"no mount namespace can be made here: {tried.stderr.strip()}" if tried.returncode else ""


def _unshare() -> list[str]:
    return ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
