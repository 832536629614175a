"""Lists by pages and by selector, and watches."""

from __future__ import annotations

import base64
import json

from tests.cluster.recording.session import MERGE, Session, recorded


@recorded("kube.cluster.Cluster.list", "kube.list_and_watch.list_and_watch", "submit.list_records")
def pages(session: Session) -> None:
    """A list by pages, without a selector and with one; its items have no kind, but those of a custom resource do."""
    for number in range(3):
        for plural, kind in (("leases", "lease"), ("configmaps", "config_map"), ("selectionruns", "run")):
            session.do("POST", session.at(plural), session.body(kind, f"item-{number}"))
    for plural, query in (
        ("leases", "limit=2"),
        ("selectionruns", "limit=2"),
        ("configmaps", "limit=2&labelSelector=prism.dev%2Frecord%3Dtrue"),
    ):
        first = session.ask("GET", session.at(plural, query=query))
        session.ask("GET", session.at(plural, query=f"{query}&continue={first['metadata']['continue']}"))
    session.ask("GET", session.at("pods", query="limit=500&labelSelector=prism.dev%2Frun%3Dnone"))


@recorded(
    "kube.cluster.Cluster.list",
    "operator.informer.Informer._selectors",
    "submit.wait_until",
    "follow.logs.merged_logs._Follower._take_all",
)
def selectors(session: Session) -> None:
    """Selectors by label and by field, and such as the server does not understand."""
    for number, run in enumerate(("one", "two")):
        labels = {"prism.dev/record": "true", "prism.dev/run": run}
        session.do("POST", session.at("configmaps"), session.body("config_map", f"item-{number}", labels=labels))
        session.do("POST", session.at("selectionruns"), session.body("run", run))
    for query in (
        "labelSelector=prism.dev%2Frecord%3Dtrue%2Cprism.dev%2Frun%3Done",
        "labelSelector=prism.dev%2Frun%20in%20%28one%2Ctwo%29%2Cprism.dev%2Frun%21%3Dtwo",
        "labelSelector=prism.dev%2Frun%2C%21other",
        "fieldSelector=metadata.name%3Ditem-1",
        "fieldSelector=data.status%3Dx",
    ):
        session.ask("GET", session.at("configmaps", query=f"limit=500&{query}"))
    for query in ("fieldSelector=metadata.name%3Done", "fieldSelector=spec.model%3Dsmall"):
        session.ask("GET", session.at("selectionruns", query=f"limit=500&{query}"))
    session.ask("GET", session.at("jobs", query="limit=500&fieldSelector=spec.suspend%3Dtrue"))


@recorded(
    "kube.cluster.Cluster.watch",
    "kube.list_and_watch.list_and_watch",
    "submit.wait_until",
    "follow.logs.merged_logs._Follower._find_pods",
)
def watch(session: Session) -> None:
    """Changes since a list, an event a line; an object that leaves the selection is DELETED; a quiet end."""
    for plural, kind in (("configmaps", "config_map"), ("selectionruns", "run")):
        version = session.do("GET", session.at(plural))["metadata"]["resourceVersion"]
        session.do("POST", session.at(plural), session.body(kind, "first", labels={"mine": "yes"}))
        session.do("POST", session.at(plural), session.body(kind, "second", labels={"mine": "no"}))
        for labels in ({"more": "x"}, {"mine": "no"}, {"mine": "yes"}):
            session.do("PATCH", session.at(plural, "first"), {"metadata": {"labels": labels}}, MERGE)
        session.do("DELETE", session.at(plural, "first"))
        query = f"watch=true&resourceVersion={version}"
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&labelSelector=mine%3Dyes"))
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&fieldSelector=metadata.name%3Dsecond"))


@recorded("kube.cluster.Cluster.watch", "kube.list_and_watch.list_and_watch")
def bookmarks(session: Session) -> None:
    """What a bookmark looks like for each kind that is watched: the first one, for which a server need not be waited for."""
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    for plural in ("configmaps", "jobs", "pods", "selectionruns"):
        session.ask("GET", session.at(plural, query=f"{query}&timeoutSeconds=1&labelSelector=mine"))


@recorded("kube.cluster.Cluster.watch", "kube.cluster.Cluster.list", "kube.list_and_watch.list_and_watch")
def long_ago(session: Session) -> None:
    """A version that is no longer known ends a watch by an ERROR event, and a list by an answer, of 410."""
    query = "watch=true&resourceVersion=1&allowWatchBookmarks=true&timeoutSeconds=1"
    session.ask("GET", session.at("selectionruns", query=query))
    session.ask("GET", session.at("pods", query="watch=true&resourceVersion=new&timeoutSeconds=1"))
    session.door.compact()
    old = json.dumps({"v": "meta.k8s.io/v1", "rv": 1, "start": "first\u0000"}, separators=(",", ":"))
    token = base64.urlsafe_b64encode(old.encode()).decode().rstrip("=")
    session.ask("GET", session.at("selectionruns", query=f"limit=1&continue={token}"))
