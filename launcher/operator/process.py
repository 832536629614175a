"""The process `prism operator`: its signals, its lease, its exit code. Decides nothing about runs."""

import logging
import os
import signal
import socket
import threading

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.operator.events import print_json_line
from launcher.operator.health import Health
from launcher.operator.leader_election import Lease
from launcher.operator.webhook import Webhook
from launcher.resource.names import LEASE

WORKERS = 4


def run_operator(
    cluster: Cluster, namespace: str | None, port: int, own_namespace: str, webhook: Webhook | None = None
) -> int:
    """Lead and reconcile until SIGTERM. Returns the exit code; a lost lease ends the process with 1.

    Args:
        namespace: whose runs; None for all namespaces.
        port: of /healthz, /readyz and /metrics; 0 takes a free one.
        own_namespace: where the lease is.
        webhook: is told of the end of each run.
    """
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[_JsonLines()], force=True)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}"
    lease = Lease(cluster, own_namespace, LEASE, identity, log=print_json_line)
    controller = Controller(cluster, namespace, log=print_json_line, workers=WORKERS, webhook=webhook)
    stopping, finished = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        controller.stop()

    def exit_at_once() -> None:
        # Another replica may lead already. An orderly end could take as long as a request.
        print_json_line(event="lease lost")
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with Health(controller, port, lease) as health:
        print_json_line(event="started", identity=identity, port=health.port, namespace=namespace or "all")
        if not lease.acquire(stopping):
            return 0
        print_json_line(event="leading", identity=identity)
        # Until `finished`, not `stopping`: the lease is kept while the last passes end.
        threading.Thread(target=lease.keep, args=(finished, exit_at_once), daemon=True).start()
        controller.run()
        finished.set()
        lease.release()
    print_json_line(event="stopped")
    return 0


class _JsonLines(logging.Handler):
    """Log records of libraries as JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print_json_line(event="log", level=record.levelname.lower(), logger=record.name, message=record.getMessage())
