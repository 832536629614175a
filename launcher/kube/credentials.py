"""Who we are and where the API server is: kubeconfig or service account, read again once the server refuses them."""

import os
import pathlib
import socket
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any

from launcher.kube.errors import NoCluster

RELOAD_SECONDS = 10.0
"""Refused credentials are read again no more often than this."""

SERVICE_ACCOUNT_NAMESPACE = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
        if hasattr(socket, name)
    ),
]
"""A peer that vanishes without closing the connection is noticed after one and a half minutes."""


@dataclass(frozen=True)
class Access:
    """Server, credentials and connections, as they were read together."""

    configuration: Any
    pool: Any
    namespace: str


class Credentials:
    """Of one context of the kubeconfig, or of the pod's own service account. Thread-safe.

    Raises:
        NoCluster: no kubeconfig and not in a pod, or one that cannot be read.
    """

    def __init__(self, context: str | None) -> None:
        # The client reads KUBECONFIG only once, when it is imported.
        self.context, self.file = context, os.environ.get("KUBECONFIG")
        self.access = _read_access(self.context, self.file)
        self._reading, self._was_read = threading.Lock(), time.monotonic() - RELOAD_SECONDS

    def renew(self, refused: Access) -> bool:
        """Read the credentials anew. False where that was done a moment ago, or they cannot be read."""
        with self._reading:
            if self.access is not refused:
                return True  # by another thread
            if time.monotonic() < self._was_read + RELOAD_SECONDS:
                return False
            self._was_read = time.monotonic()
            try:
                self.access = _read_access(self.context, self.file)
            except NoCluster:
                return False
            return True


def _read_access(context: str | None, file: str | None) -> Access:
    """Server and credentials as they are on disk now, or as the kubeconfig's own command prints them."""
    import urllib3
    from kubernetes.client import configuration as settings
    from kubernetes.client import rest

    configuration = settings.Configuration()
    namespace = _load(configuration, context, file)
    configuration.retries = False  # ours are counted and reported
    if not configuration.verify_ssl:  # the person's own choice, in the kubeconfig; urllib3 would warn at every request
        warnings.filterwarnings("ignore", category=urllib3.exceptions.InsecureRequestWarning)
    # Its pool knows certificates and proxies; the rest of the client changes from version to version.
    pool = rest.RESTClientObject(configuration).pool_manager
    pool.connection_pool_kw["socket_options"] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEP_ALIVE]
    return Access(configuration, pool, namespace)


def _load(configuration: Any, context: str | None, file: str | None) -> str:
    """Fill in server and credentials; returns the namespace that belongs to them."""
    from kubernetes import config

    try:
        try:
            config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
        except config.ConfigException:
            if context or not SERVICE_ACCOUNT_NAMESPACE.exists():
                raise
            config.load_incluster_config(client_configuration=configuration)
            return SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
        contexts, current = config.list_kube_config_contexts(config_file=file)
        chosen = next((known for known in contexts if known["name"] == context), current) if context else current
        return str((chosen.get("context") or {}).get("namespace") or "default")
    except (config.ConfigException, OSError) as error:
        fix = "set KUBECONFIG, or check that `kubectl get pods` works here"
        raise NoCluster(f"no cluster to connect to: {error}", where="kubeconfig", fix=fix) from error
