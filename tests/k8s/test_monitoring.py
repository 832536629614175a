"""Laws of k8s/monitoring: Prometheus finds the operator, and the dashboard shows only what the operator serves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.operator.leader_election import Lease
from launcher.operator.metrics import metrics_registry
from launcher.resource.names import LEASE
from launcher.resource.status import PHASES
from tests.cluster.rig import variables
from tests.cluster.server.apiserver import ApiServer
from tests.k8s.test_manifests import INSTALLED, K8S, Object, built, load, one, title
from tests.k8s.validation import VERSIONS, validate

MONITORING = K8S / "monitoring"
DASHBOARD = json.loads((MONITORING / "operator-dashboard.json").read_text(encoding="utf-8"))

TARGET_LABELS = {"namespace", "pod", "service", "job", "instance", "endpoint", "container"}
"""Labels that Prometheus adds to each sample of a target that a ServiceMonitor names."""

KEYWORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "bool", "and", "or", "unless", "offset"}
LABEL_LISTS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
MATCHERS = re.compile(r"\{([^{}]*)\}")
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"


def metric_names(expression: str) -> set[str]:
    """Every name of a PromQL expression that is neither a label, a function, a keyword nor a duration."""
    text = re.sub(r'"[^"]*"', '""', expression)
    text = MATCHERS.sub(" ", LABEL_LISTS.sub(" ", text))
    text = re.sub(r"\[[^\]]*\]", " ", text)
    return {match[0] for match in re.finditer(rf"(?<![\w:.$]){NAME}\b(?!\s*\()", text)} - KEYWORDS


def label_names(expression: str) -> set[str]:
    """The labels that a PromQL expression matches or groups by."""
    text = re.sub(r'"[^"]*"', '""', expression)
    matched = {name for matchers in MATCHERS.findall(text) for name in re.findall(rf"({NAME})\s*[=!]", matchers)}
    return matched | {name for listed in LABEL_LISTS.findall(text) for name in re.findall(NAME, listed)}


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ("up", {"up"}, set()),
        ('sum by (le) (rate(a_bucket{job="b", c!~"d|e"}[5m]))', {"a_bucket"}, {"le", "job", "c"}),
        ("histogram_quantile(0.5, sum(increase(a:b[$__rate_interval])) by (le))", {"a:b"}, {"le"}),
        ("a_total offset 5m / on (pod) group_left (node) b and ignoring (x) c > bool 1e3", {"a_total", "b", "c"}, None),
    ],
)
def test_the_names_of_an_expression_are_found(expression: str, metrics: set[str], labels: set[str] | None) -> None:
    assert metric_names(expression) == metrics
    assert labels is None or label_names(expression) == labels


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(rf"label_values\((.+), ({NAME})\)", variable["query"])
            assert match, variable["query"]
            yield f"sum by ({match[2]}) ({match[1]})"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Sample name -> its label names, of what the operator answers to Prometheus."""
    with ApiServer() as server, variables(KUBECONFIG=str(server.kubeconfig(tmp_path_factory.mktemp("k") / "config"))):
        controller = Controller(Cluster(), None)
        text = generate_latest(metrics_registry(controller, Lease(Cluster(), "default", LEASE, "a"))).decode()
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_asks_only_for_what_the_operator_serves(expression: str, served: dict[str, set[str]]) -> None:
    names = metric_names(expression)
    assert names, expression
    assert names <= served.keys()
    assert label_names(expression) <= set.union(TARGET_LABELS, *(served[name] for name in names))
    for values in re.findall(r'phase=~?"([^"]*)"', expression):
        assert set(values.split("|")) <= set(PHASES)
    assert "namespace" in label_names(expression), "an operator of another namespace has the same metrics"


def test_the_dashboard_shows_every_metric_of_the_operator(served: dict[str, set[str]]) -> None:
    shown = set().union(*map(metric_names, expressions()))
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in served if name.startswith("prism_")}
    assert families == {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown if name.startswith("prism_")}


def test_the_panels_have_their_own_place_and_the_chosen_data_source() -> None:
    panels = DASHBOARD["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


# Manifests


def service_monitor() -> Object:
    return one("ServiceMonitor/prism-operator", load(MONITORING))


def test_the_service_monitor_selects_the_operators_service_alone_and_its_port() -> None:
    spec = service_monitor()["spec"]
    assert spec.keys() == {"selector", "endpoints"}  # without namespaceSelector: its own namespace
    wanted = spec["selector"]["matchLabels"].items()
    services = [it for it in INSTALLED if it["kind"] == "Service"]
    (service,) = (it for it in services if wanted <= it["metadata"]["labels"].items())
    (endpoint,) = spec["endpoints"]
    assert endpoint["path"] == "/metrics"
    (port,) = (port for port in service["spec"]["ports"] if port["name"] == endpoint["port"])
    (policy,) = (it for it in INSTALLED if it["kind"] == "NetworkPolicy")
    allowed = [rule for rule in policy["spec"]["ingress"] if {"port": port["port"], "protocol": "TCP"} in rule["ports"]]
    assert any("from" not in rule for rule in allowed), "Prometheus is in a namespace that we do not know"


def test_the_installation_needs_no_prometheus_operator() -> None:
    assert "monitoring.coreos.com/v1" not in {it["apiVersion"] for it in INSTALLED}
    resources = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
    assert not [path for path in resources if "monitoring" in path]


def test_kubectl_builds_the_service_monitor_and_the_dashboard_for_the_namespace_of_the_operator() -> None:
    objects = built("monitoring")
    assert sorted(map(title, objects)) == ["ConfigMap/prism-operator-dashboard", "ServiceMonitor/prism-operator"]
    assert {it["metadata"]["namespace"] for it in objects} == {"prism-system"}
    config_map = one("ConfigMap/prism-operator-dashboard", objects)
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    ((name, text),) = config_map["data"].items()
    assert name.endswith(".json")
    assert json.loads(text) == DASHBOARD
    assert len(json.dumps(config_map)) < 131_072  # kubectl apply keeps a copy in an annotation
    for version in VERSIONS:
        validate(config_map, version)
