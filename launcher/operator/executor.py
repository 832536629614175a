"""Turns the actions of a decision into API calls, and remembers which Jobs the server refused. Decides nothing."""

import datetime
import json
from collections.abc import Callable

from launcher.kube.cluster import Cluster
from launcher.kube.errors import Conflict, NotFound, Refused
from launcher.operator.cache import Cache
from launcher.reconcile.actions import Action, Apply, Create, CreateError, Delete
from launcher.reconcile.child_status import is_owned_by
from launcher.resource.names import KIND
from launcher.resource.object import Object
from launcher.resource.record import Record
from launcher.resource.status import Status

NOT_ABOUT_THE_JOB = (0, 401)
"""Codes of a refusal that has nothing to do with the object that was to be created."""


class Executor:
    """Executes actions one by one. What was done before an error stands.

    Args:
        log: called with the fields of a log line.
    """

    def __init__(
        self, cluster: Cluster, cache: Cache, clock: Callable[[], datetime.datetime], log: Callable[..., None]
    ) -> None:
        self.cluster, self.cache, self.clock, self.log = cluster, cache, clock, log
        self._dropped: set[str] = set()
        """Fields of a status that the server did not keep, as the log says once."""

    def execute(self, action: Action, record: Record, create_errors: dict[str, CreateError]) -> None:
        """Raises ClusterError.

        Args:
            create_errors: by Job name; a refused Create is written into it, a successful one removed from it.
        """
        run = f"{record.namespace}/{record.name}"
        match action:
            case Apply(wanted):
                self._apply(wanted, record)
            case Create(wanted):
                self._create_job(wanted, record, create_errors)
                self.log(event="created", run=run, job=wanted["metadata"]["name"])
            case Delete(kind, namespace, name, uid):
                self.cluster.delete(kind, namespace, name, uid=uid)
                self.log(event="deleted", run=run, kind=kind, name=name)

    def write_status(self, record: Record, status: Status) -> bool:
        """The one status write of a pass, onto the version that was read. Returns whether there was something to write."""
        if status == record.status:
            return False
        kind = record.kind
        try:
            written = write_status(self.cluster, record, status)
        except Conflict:
            self.cache.put({"kind": kind, **self.cluster.get(kind, record.namespace, record.metadata["name"])})
            raise
        except NotFound:
            return False  # removed meanwhile
        self.cache.put({"kind": kind, **written})
        self._log_dropped_fields(status, Record({"kind": kind, **written}).status)
        if status.phase != record.status.phase:
            run = f"{record.namespace}/{record.name}"
            self.log(event="phase", run=run, phase=status.phase, message=status.message)
        return True

    def _log_dropped_fields(self, wrote: Status, kept: Status) -> None:
        """A server with the CRD of an earlier version drops what that does not know, and reports success."""
        before, after = wrote.to_document(), kept.to_document()
        fields = {name for name in before if before[name] != after.get(name)}
        if fields - self._dropped:
            self._dropped |= fields
            fix = "install the CRD of this version of PRISM: without these fields no webhook is sent, and times are missing"
            self.log(event="status fields dropped by the server", fields=sorted(fields), fix=fix)

    def _apply(self, wanted: Object, record: Record) -> None:
        """Server-side apply; an object of that name that belongs to another owner is left alone."""
        metadata = wanted["metadata"]
        found = self.cluster.find(wanted["kind"], metadata["namespace"], metadata["name"])
        if found is None:
            self._create(wanted, record)
            return
        _check_owner(wanted, found, record)
        # With the uid of the object that was checked: if another takes its name meanwhile, that is a Conflict.
        self.cluster.apply({**wanted, "metadata": {**metadata, "uid": found["metadata"]["uid"]}})

    def _create_job(self, wanted: Object, record: Record, create_errors: dict[str, CreateError]) -> None:
        name = wanted["metadata"]["name"]
        try:
            created = self._create(wanted, record)
        except Refused as error:
            if error.code not in NOT_ABOUT_THE_JOB:
                since = create_errors[name].since if name in create_errors else self.clock()
                create_errors[name] = CreateError(error.code, error.what, since)
            raise
        create_errors.pop(name, None)
        self.cache.put(created)

    def _create(self, wanted: Object, record: Record) -> Object:
        """The object as the server has it, created now or earlier by us."""
        metadata = wanted["metadata"]
        try:
            return {"kind": wanted["kind"], **self.cluster.create(wanted)}
        except Conflict:
            # Created by us with the answer lost, or by another host; or left by an earlier run of this name.
            found = self.cluster.get(wanted["kind"], metadata["namespace"], metadata["name"])
            _check_owner(wanted, found, record)
            return {"kind": wanted["kind"], **found}


def write_status(cluster: Cluster, record: Record, status: Status) -> Object:
    """Write onto the version of the record that was read. Raises Conflict where it is not the newest."""
    version = {"resourceVersion": record.metadata["resourceVersion"]}
    name = record.metadata["name"]
    if record.is_config_map:
        change = {"metadata": version, "data": {"status": json.dumps(status.to_document(), ensure_ascii=False)}}
        return cluster.patch("ConfigMap", record.namespace, name, change)
    # A merge patch keeps the fields that it does not name: those without a value now are named with null.
    nulls = {str(field.alias): None for field in Status.model_fields.values()}
    change = {"metadata": version, "status": {**nulls, **status.to_document()}}
    return cluster.patch(KIND, record.namespace, name, change, subresource="status")


def _check_owner(wanted: Object, found: Object, record: Record) -> None:
    """Raises Refused where the object is owned by another run or user, Conflict where it is being removed."""
    title = f"{wanted['kind']} {wanted['metadata']['name']}"
    if not is_owned_by(found, record.uid):
        what = f"{title} exists already and is owned by another run or user"
        raise Refused(what, where=record.name, fix="remove it, or give the run another name")
    if "deletionTimestamp" in found["metadata"]:
        raise Conflict(f"{title} is being removed", where=record.name, fix="wait until it is gone", code=409)
