"""A run from outside: put its record into a cluster, wait for its end, cancel it, run it again. Does not know its pods.

Where the custom resource is not installed, a ConfigMap keeps the record and the process that waits drives the run itself.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.kube.cluster import Cluster, Listing
from launcher.kube.errors import Conflict, NotFound, Refused, Unavailable
from launcher.kube.list_and_watch import Change, list_and_watch
from launcher.operator.controller import Controller
from launcher.resource.document import differences, parse_for_cluster, request_digest
from launcher.resource.names import CANCEL_ANNOTATION, KIND, RECORD_LABEL, is_dns_label, record_name
from launcher.resource.object import Object
from launcher.resource.record import Record, config_map_record, is_record, text_of_round
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun, read_yaml

MAX_TRIES = 10
"""How often a change is tried to a record that others write too."""


@dataclass(frozen=True)
class Document:
    """A document as it was written, what it means, and its namespace in the cluster (empty: that of the kubeconfig)."""

    text: str
    run: SelectionRun
    namespace: str


@dataclass(frozen=True)
class Submitted:
    """The result of a submit. `action`: created; attached, to a run in progress; begun again, after its end."""

    record: Record
    action: str


def record_kind(cluster: Cluster) -> str:
    """SelectionRun where that kind is installed, else ConfigMap."""
    return KIND if cluster.serves_selection_runs() else "ConfigMap"


def find_record(cluster: Cluster, namespace: str, run: str) -> Record | None:
    """The record of a run, of either kind.

    Discovery shows whether the kind is installed. An API server checks the user's rights before it looks for the kind: a
    person without rights to SelectionRuns gets 403 also where they are not installed.
    """
    names = {KIND: run} if cluster.serves_selection_runs() else {}
    for kind, name in (names | {"ConfigMap": record_name(run)}).items():
        found = cluster.find(kind, namespace, name)
        if found is not None and is_record(found):
            return Record(found)
    return None


def get_record(cluster: Cluster, namespace: str, run: str) -> Record:
    """As find_record. Raises NotFound, which names the run."""
    record = find_record(cluster, namespace, run)
    if record is None:
        fix = "`prism list` shows the runs; -n names another namespace"
        raise NotFound(f"no run named {run}", where=f"namespace {namespace}", fix=fix, code=404)
    return record


def list_records(cluster: Cluster, namespace: str | None) -> list[Record]:
    """All runs, of either kind, by namespace and name."""
    found = cluster.list("ConfigMap", namespace, labels=f"{RECORD_LABEL}=true").items
    if cluster.serves_selection_runs():
        found += cluster.list(KIND, namespace).items
    return sorted(map(Record, found), key=lambda record: (record.namespace, record.name))


def submit(cluster: Cluster, document: Document, namespace: str) -> Submitted:
    """Put a run into the cluster. The same name and content are the same run: a second submit attaches to it, or begins it
    again.

    Raises:
        SpecError: a run of that name asks for something else; the error lists what differs.
        Refused: the API server does not accept it.
    """
    run = document.run
    for _ in range(MAX_TRIES):
        there = find_record(cluster, namespace, run.metadata.name)
        if there is None:
            try:
                return Submitted(_create(cluster, document, namespace), "created")
            except Conflict:
                continue  # another submit was first
        if there.is_deleting:
            time.sleep(0.5)
            continue
        _check_same_request(run, there)
        if not has_ended(there):
            return Submitted(there, "attached")
        try:
            return Submitted(run_again(cluster, there), "begun again")
        except (Conflict, NotFound):
            continue
    fix = f"submit again; `prism status {run.metadata.name} -n {namespace}` shows who drives it"
    what = f"the run's record changed during each of {MAX_TRIES} tries"
    raise Unavailable(what, where=f"{namespace}/{run.metadata.name}", fix=fix)


def _create(cluster: Cluster, document: Document, namespace: str) -> Record:
    run = document.run
    wanted = config_map_record(run, document.text, namespace)
    if record_kind(cluster) == KIND:
        written = read_yaml(document.text, run.metadata.name)  # without any default: what `kubectl apply` would send
        wanted = {**written, "metadata": {**written["metadata"], "namespace": namespace}}
    try:
        return Record(cluster.create(wanted))
    except Refused as error:
        if error.code not in (400, 422):
            raise
        where = f"{namespace}/{run.metadata.name}"
        raise SpecError(f"the API server refuses the document: {error.what}", where=where, fix=error.fix) from error


def _check_same_request(run: SelectionRun, there: Record) -> None:
    where = f"{there.namespace}/{there.name}"
    try:
        theirs = there.parse()
    except SpecError as error:
        what = f"the run of that name in the cluster is not valid: {error.what}"
        fix = "remove it (`kubectl delete`), or submit under another metadata.name"
        raise SpecError(what, where=where, fix=fix) from None
    if request_digest(run) == request_digest(theirs):
        return
    lines = "\n  ".join(["a run of that name asks for something else:", *differences(run, theirs)[:20]])
    raise SpecError(lines, where=where, fix="give the changed document another metadata.name, or remove the run first")


def run_again(cluster: Cluster, record: Record) -> Record:
    """Begin another round: the same document, the data as they are now. Raises Conflict where the record has changed."""
    next_round = record.round + 1
    version: Object = {"metadata": {"resourceVersion": record.metadata["resourceVersion"]}}
    if record.is_config_map:
        return _patch(cluster, record, {**version, "data": {"selection.yaml": text_of_round(record, next_round)}})
    return _patch(cluster, record, {**version, "spec": {"retry": next_round}})


def cancel(cluster: Cluster, record: Record) -> Record:
    """Ask for the end of the current round. The process that drives the run ends it; finished shards stay."""
    return _patch(cluster, record, {"metadata": {"annotations": {CANCEL_ANNOTATION: str(record.round)}}})


def _patch(cluster: Cluster, record: Record, change: Object) -> Record:
    return Record(cluster.patch(record.kind, record.namespace, record.metadata["name"], change))


@contextlib.contextmanager
def driven_here(cluster: Cluster, record: Record, log: Callable[..., None] | None = None) -> Iterator[Controller]:
    """Inside this context, the process drives the run, unless an operator does."""
    controller = Controller(
        cluster.without_retries(), record.namespace, kind=record.kind, only=record.name, host="client", log=log
    )
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    try:
        yield controller
    finally:
        controller.stop()
        thread.join(timeout=10)


def wait_until(
    cluster: Cluster,
    record: Record,
    is_enough: Callable[[Record], bool],
    *,
    timeout_seconds: float | None = None,
    on_change: Callable[[Record], None] = lambda _: None,
    on_outage: Callable[[str], None] = lambda _: None,
) -> Record | None:
    """Wait until `is_enough` is true of a record. None where the record was removed before that.

    Args:
        on_change: called with each version of the record, before `is_enough`.
        on_outage: called once an outage, with a line for the person who waits.

    Raises:
        TimeoutError: `is_enough` was not true in time.
        Refused: we have no right to read the record.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    changes = list_and_watch(
        cluster.without_retries(),
        record.kind,
        record.namespace,
        fields=f"metadata.name={record.metadata['name']}",
        deadline=deadline,
        on_outage=on_outage,
    )
    try:
        for found in itertools.chain.from_iterable(map(_records, changes)):
            if found is None or found.uid != record.uid:
                return None
            on_change(found)
            if is_enough(found):
                return found
    except NotFound:  # the kind itself was removed, and all of its objects
        return None
    raise TimeoutError


def _records(seen: Listing | Change) -> list[Record | None]:
    """The record as it is then; None once it is removed."""
    match seen:
        case Listing(items):
            return [Record(items[0])] if items else [None]
        case ("BOOKMARK", _):
            return []
        case ("DELETED", found):
            return [Record(found), None]
        case (_, found):
            return [Record(found)]


def has_ended(record: Record) -> bool:
    """Whether the requested round is over."""
    return record.status.is_terminal and record.status.round >= record.round


def is_over(cluster: Cluster, record: Record) -> bool:
    """Whether a run has ended, or its record was removed, as the cluster has it now."""
    found = cluster.find(record.kind, record.namespace, record.metadata["name"])
    return found is None or Record(found).uid != record.uid or has_ended(Record(found))


def read_document(text: str, where: str, namespace: str) -> Document:
    """The checked document, for the given namespace, else its own. Raises SpecError."""
    run = parse_for_cluster(text, where)
    namespace = namespace or run.metadata.namespace or ""
    if namespace and not is_dns_label(namespace):
        fix = "use lower-case letters, digits and '-'"
        raise SpecError(f"'{namespace}' is not a valid namespace", where="metadata.namespace, or -n", fix=fix)
    return Document(text, run, namespace)


def outcome(record: Record) -> dict[str, Any]:
    """The facts of a run that `-o json` prints: how far it is, or how it ended."""
    names = "phase message manifest round units missing_units examples pairs bad_rows selected restarts"
    status = {name: getattr(record.status, name) for name in names.split()}
    return {"run": record.name, "namespace": record.namespace, **status}
