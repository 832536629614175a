"""One container of a pod as a local process: its environment, its folders, its log, its ending.

Knows nothing of the API server: ConfigMaps and Secrets come through a function, and what is said goes out as plain data.
There is no chroot: each mount is a folder of the host, and every mention of its path in command, args and environment is
rewritten to that folder. Hostnames of pods become 127.0.0.1, with a port of their own where one is named.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.kubelet.mirror import Thing, stamp, uid_of
from tests.cluster.kubelet.tokens import MOUNT_PATH, Tokens, files_of, mounted, why_no_mounts
from tests.cluster.podlogs import PodLogs

MAX_MESSAGE_BYTES = 4096
MAX_FALLBACK_BYTES = 2048
MAX_FALLBACK_LINES = 80
LAUNCHER_IMAGE = "prism-operator"
"""In the name of an image whose entry point is `prism`; that of any other image is the job."""
MARK = "RIG_POD_UID"
"""In the environment of each process of a pod, so that none is missed however it was started."""

Fetch = Callable[[str, str], "Thing | None"]
"""Plural ("configmaps", "secrets") and name to the object of the pod's namespace, if it exists."""


class NotYet(Exception):
    """Something the pod needs is missing: a ConfigMap, a Secret. `reason` is the container's waiting reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class NotHere(Exception):
    """The pod asks for what these fake nodes do not do. Such a pod fails, loudly."""


@dataclass
class Container:
    """A started container."""

    pod_uid: str
    name: str
    node: str
    folder: Path
    log: Path
    message_file: Path
    fall_back_to_log: bool
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.time)
    ended: float | None = None
    oom: bool = False
    stop_before: float | None = None  # monotonic: SIGKILL then
    reported: bool = False

    def signal_all(self, number: int) -> None:
        """To every process of the pod, also those in groups of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        for pid in _processes_of(self.pod_uid):
            if _group_of(pid) != self.process.pid:
                send(pid, number)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Kill what is left. Twice, since a process may have forked meanwhile."""
        for _ in range(2):
            self.signal_all(signal.SIGKILL)
            self.process.wait()
        self.ended = self.ended or time.time()

    def terminated(self) -> dict[str, Any]:
        """The `terminated` state of the container's status."""
        times = {"startedAt": stamp(self.started), "finishedAt": stamp(self.ended or time.time())}
        code = self.process.returncode
        code = 128 - code if code < 0 else code
        reason = "OOMKilled" if self.oom else "Completed" if code == 0 else "Error"
        message = _tail(self.message_file, MAX_MESSAGE_BYTES)
        if not message and code and self.fall_back_to_log:
            lines = _tail(self.log, MAX_FALLBACK_BYTES).splitlines(keepends=True)
            message = "".join(lines[-MAX_FALLBACK_LINES:])
        return {"exitCode": code, "reason": reason, **({"message": message} if message else {}), **times}


def start(
    pod: Thing,
    folder: Path,
    logs: PodLogs,
    fetch: Fetch,
    environment: Mapping[str, str],
    names: Names,
    tokens: Tokens | None = None,
) -> Container:
    """The pod's container, running.

    Args:
        tokens: of service accounts. None: what asks for one gets an empty file.

    Raises:
        NotYet: a ConfigMap or Secret is missing.
        NotHere: several containers, hostPath, an unknown command and so on.
    """
    spec = pod["spec"]
    if spec.get("initContainers") or len(spec["containers"]) != 1:
        raise NotHere("these nodes run pods of exactly one container, without init containers")
    container, (home, work) = spec["containers"][0], (folder / uid_of(pod), folder / uid_of(pod) / "work")
    work.mkdir(parents=True, exist_ok=True)
    if unknown := {"envFrom", "workingDir"} & container.keys():
        raise NotHere(f"these nodes do not know of a container's {' and '.join(sorted(unknown))}")
    volumes = {volume["name"]: _make_volume(volume, pod, home, fetch, tokens) for volume in spec.get("volumes") or []}
    mounts = container.get("volumeMounts") or []
    if any("subPath" in mount for mount in mounts):
        raise NotHere("these nodes mount whole volumes only, no subPath")
    places = {mount["mountPath"].rstrip("/"): volumes[mount["name"]] for mount in mounts}
    log = logs.path(pod["metadata"]["namespace"], pod["metadata"]["name"], uid_of(pod), container["name"])
    log.parent.mkdir(parents=True, exist_ok=True)
    message_path = container.get("terminationMessagePath") or "/dev/termination-log"
    message_file = places[message_path] = home / "termination-log"
    message_file.touch()

    variables = _variables(pod, container, fetch)
    command = [expand(word, variables) for word in [*(container.get("command") or []), *(container.get("args") or [])]]
    command = [names.rewrite(rewrite(word, places), pod) for word in command]
    variables = {name: names.rewrite(rewrite(value, places), pod) for name, value in variables.items()}
    if not container.get("command"):
        module = "launcher.cli.main" if LAUNCHER_IMAGE in container["image"] else "prism_job"
        command = [sys.executable, "-m", module, *command]
    elif command[0] == "prism":
        command = [sys.executable, "-m", "launcher.cli.main", *command[1:]]
    elif command[0] in ("python", "python3"):
        command[0] = sys.executable
    ours = {**environment, "PRISM_TERMINATION_LOG": str(message_file), MARK: uid_of(pod)}
    full = {"PATH": os.environ["PATH"], **variables, **ours}
    if shutil.which(command[0], path=full["PATH"]) is None:
        raise NotHere(f'exec: "{command[0]}": executable file not found in $PATH')
    if tokens is not None and MOUNT_PATH in places:
        if reason := why_no_mounts():
            raise NotHere(f"a service-account token needs a mount of its own: {reason}")
        command = mounted(command, places[MOUNT_PATH])
    # Should the rig itself be killed, the kernel kills the pod's main process.
    guard = [setpriv, "--pdeathsig", "KILL", "--"] if (setpriv := shutil.which("setpriv")) else []
    with log.open("ab") as output:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        process = subprocess.Popen([*guard, *command], env=full, cwd=work, start_new_session=True, **pipes)
    fall_back_to_log = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    place = (uid_of(pod), container["name"], spec["nodeName"], home)
    return Container(*place, log, message_file, fall_back_to_log, process)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) as Kubernetes does it: `$$` is a dollar, an unknown name stays as it is."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda hit: "$" if hit[0] == "$$" else variables.get(hit[1], hit[0]), text)


def rewrite(text: str, places: Mapping[str, Path]) -> str:
    """Every path in `places` turned into its folder, longest first, at the borders of a path; in one pass."""
    if not places:
        return text
    paths = "|".join(re.escape(path) for path in sorted(places, key=len, reverse=True))
    # Not inside another path or an address (s3://bucket/data), but after file://.
    borders = rf"(?:(?<=file://)|(?<![\w./~-]))(?:{paths})(?![\w.-])"
    return re.sub(borders, lambda hit: str(places[hit[0]]), text)


class Names:
    """What the cluster's DNS would say: every `<hostname>.<subdomain>` is 127.0.0.1.

    All pods share one network here, so each host and port gets a port of its own: two masters do not meet.
    """

    def __init__(self) -> None:
        self._ports: dict[tuple[str, str, str], int] = {}
        # Below the range from which the kernel gives ports away; two rigs start far apart.
        self._next = itertools.cycle(range(20000, 32000))
        for _ in range(os.getpid() * 37 % 12000):
            next(self._next)

    def rewrite(self, text: str, pod: Thing) -> str:
        """The addresses of the pod's gang in `text`: hosts `<any>-<index>.<its subdomain>` or its own hostname."""
        subdomain, namespace = pod["spec"].get("subdomain"), pod["metadata"]["namespace"]
        if not subdomain:
            return text
        dns = (
            rf"(?<![\w.-])([a-z0-9-]+)\.{re.escape(subdomain)}(?:\.{re.escape(namespace)}(?:\.svc(?:\.[a-z0-9.-]+)?)?)?"
        )
        return re.sub(rf"{dns}(?![\w.-])(?::(\d+))?", lambda hit: self._address(namespace, subdomain, hit), text)

    def _address(self, namespace: str, subdomain: str, hit: re.Match[str]) -> str:
        if hit[2] is None:
            return "127.0.0.1"
        key = (namespace, f"{hit[1]}.{subdomain}", hit[2])
        if key not in self._ports:
            self._ports[key] = next(port for port in self._next if _is_free(port))
        return f"127.0.0.1:{self._ports[key]}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _variables(pod: Thing, container: Thing, fetch: Fetch) -> dict[str, str]:
    """The container's environment, expanded but not rewritten."""
    found: dict[str, str] = {}
    for variable in container.get("env") or []:
        try:
            value = _value(variable, pod, fetch)
        except NotYet:
            if (variable.get("valueFrom") or {}).get("secretKeyRef", {}).get("optional"):
                continue  # the variable is not set
            raise
        found[variable["name"]] = expand(value, found) if "valueFrom" not in variable else value
    return found


def _value(variable: Thing, pod: Thing, fetch: Fetch) -> str:
    source = variable.get("valueFrom")
    if not source:
        return str(variable.get("value") or "")
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        content = _content("secrets", reference["name"], fetch, "CreateContainerConfigError")
        if reference["key"] in content:
            return content[reference["key"]].decode()
        missing = f"couldn't find key {reference['key']} in secret {reference['name']}"
        raise NotYet("CreateContainerConfigError", missing)
    raise NotHere(f"env {variable['name']}: no such source on these nodes: {sorted(source)}")


def field_of(pod: Thing, path: str) -> str:
    """A fieldRef's value."""
    if hit := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((pod["metadata"].get(hit[1]) or {}).get(hit[2], ""))
    value: Any = pod
    for name in path.split("."):
        value = (value or {}).get(name)
    return "" if value is None else str(value)


def _content(plural: str, name: str, fetch: Fetch, waiting: str) -> dict[str, bytes]:
    """The entries of a ConfigMap or Secret."""
    held = fetch(plural, name)
    if held is None:
        raise NotYet(waiting, f'{plural[:-1]} "{name}" not found')
    decode = str.encode if plural == "configmaps" else base64.b64decode
    return {name: decode(text) for name, text in (held.get("data") or {}).items()}


def _make_volume(volume: Thing, pod: Thing, home: Path, fetch: Fetch, tokens: Tokens | None) -> Path:
    """The folder of a volume, filled."""
    folder = home / "volumes" / str(volume["name"])
    folder.mkdir(parents=True, exist_ok=True)
    for source in (volume.get("projected") or {}).get("sources") or [volume]:
        if token := source.get("serviceAccountToken"):
            files_of(token, pod, folder, tokens)
            continue
        try:
            files = _files(source, pod, fetch)
        except NotYet as missing:
            why = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {missing.message}'
            raise NotYet(missing.reason, why) from missing
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


def _files(source: Thing, pod: Thing, fetch: Fetch) -> dict[str, bytes]:
    """What a volume, or one source of a projected one, holds at first."""
    if "configMap" in source:
        content = _content("configmaps", source["configMap"]["name"], fetch, "ContainerCreating")
        items = source["configMap"].get("items") or [{"key": name, "path": name} for name in content]
        return {item["path"]: content[item["key"]] for item in items}
    if "downwardAPI" in source:
        items = source["downwardAPI"]["items"]
        return {item["path"]: field_of(pod, item["fieldRef"]["fieldPath"]).encode() for item in items}
    if "emptyDir" in source:
        return {}
    raise NotHere(f"no such volume on these nodes: {source}")


def _tail(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - max_bytes, 0))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def _processes_of(pod_uid: str) -> list[int]:
    found = []
    mark = f"{MARK}={pod_uid}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile, or is another user's
    return found


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
