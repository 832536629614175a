"""Admission: Pod Security, service accounts, ValidatingAdmissionPolicies and quotas. No schemas, no rules of a kind."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from tests.cluster.server import podsecurity
from tests.cluster.server.faults import Request
from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.rules import policy_holds
from tests.cluster.server.kinds.schemas import quantity
from tests.cluster.server.refusals import ApiError, about, forbidden
from tests.cluster.server.store import Object, Store


class Admission:
    """Judges writes by what is stored beside them."""

    def __init__(self, store: Store, resources: Callable[[], list[Resource]]) -> None:
        self.store, self.resources = store, resources

    def check(self, request: Request, resource: Resource, new: Object, old: Object | None, warnings: list[str]) -> None:
        """Pod security, service accounts and quota, as admission judges them."""
        if not resource.namespaced:
            return
        name, space = new["metadata"]["name"], request.namespace
        labels = (self.store.get(("", "namespaces"), "", space) or {"metadata": {}})["metadata"].get("labels", {})
        level = labels.get("pod-security.kubernetes.io/enforce")
        pod = _pod_spec_in(resource, new)
        judged = level == "restricted" and pod and (old is None or _pod_spec_in(resource, old) != pod)
        if judged and (found := podsecurity.violations(pod or {})):
            text = f'PodSecurity "restricted:latest": {", ".join(found)}'
            if resource.plural == "pods":
                raise forbidden(resource, name, f"violates {text}")
            warnings.append(f"would violate {text}")
        if old is not None:
            return
        if resource.plural == "pods":
            account = new["spec"]["serviceAccountName"]
            if not self.store.get(("", "serviceaccounts"), space, account):
                text = f'error looking up service account {space}/{account}: serviceaccount "{account}" not found'
                raise forbidden(resource, name, text)
        self._check_policies(resource, new, space)
        self._check_quota(resource, new, space)

    def _check_policies(self, resource: Resource, new: Object, namespace: str) -> None:
        """ValidatingAdmissionPolicies on what is created, as far as a rule speaks of the object alone."""
        group = "admissionregistration.k8s.io"
        policies = {one["metadata"]["name"]: one for one in self.store.list((group, "validatingadmissionpolicies"))}
        space = self.store.get(("", "namespaces"), "", namespace) or {}
        for binding in self.store.list((group, "validatingadmissionpolicybindings")):
            name, chosen = binding["metadata"]["name"], binding["spec"].get("matchResources", {})
            wanted = chosen.get("namespaceSelector", {}).get("matchLabels", {})
            policy = policies.get(binding["spec"]["policyName"])
            if not policy or not wanted.items() <= space["metadata"].get("labels", {}).items():
                continue
            rules = policy["spec"]["matchConstraints"]["resourceRules"]
            if not any(resource.plural in rule["resources"] and resource.group in rule["apiGroups"] for rule in rules):
                continue
            for rule in policy["spec"]["validations"]:
                if policy_holds(rule["expression"], new):
                    continue
                by = f"ValidatingAdmissionPolicy '{policy['metadata']['name']}' with binding '{name}'"
                text = f"{by} denied request: {rule.get('message') or 'failed expression: ' + rule['expression']}"
                named, told = new["metadata"]["name"], about(resource, new["metadata"]["name"])
                message = f'{resource.qualified} "{named}" is forbidden: {text}'
                raise ApiError(422, message, details={**told, "causes": [{"message": text}]})

    def _check_quota(self, resource: Resource, new: Object, namespace: str) -> None:
        for quota in self.store.list(("", "resourcequotas"), namespace):
            hard = quota.get("spec", {}).get("hard", {})
            missing = [entry for entry in hard if resource.plural == "pods" and _unsaid(entry, new)]
            if missing:
                silent = ",".join(container["name"] for container in new["spec"]["containers"])
                listed = "; ".join(f"{entry} for: {silent}" for entry in missing)
                text = f"failed quota: {quota['metadata']['name']}: must specify {listed}"
                raise forbidden(resource, new["metadata"]["name"], text)
            asked = {entry: _charge(entry, resource, new) for entry in hard}
            used = {entry: self._used(entry, namespace) for entry in hard if asked[entry]}
            over = [entry for entry in used if used[entry] + asked[entry] > quantity(hard[entry])]
            if over:
                parts = [
                    f"{word}: " + ",".join(f"{entry}={_plain(amounts[entry])}" for entry in over)
                    for word, amounts in (("requested", asked), ("used", used), ("limited", hard))
                ]
                text = f"exceeded quota: {quota['metadata']['name']}, {', '.join(parts)}"
                raise forbidden(resource, new["metadata"]["name"], text)

    def _used(self, entry: str, namespace: str) -> Decimal:
        return sum(
            (
                _charge(entry, resource, item)
                for resource in {r.key: r for r in self.resources() if r.namespaced}.values()
                for item in self.store.list(resource.key, namespace)
            ),
            Decimal(0),
        )

    def count_quota(self, quota: Object) -> None:
        hard, namespace = quota.get("spec", {}).get("hard", {}), quota["metadata"]["namespace"]
        status = {"hard": hard, "used": {entry: _plain(self._used(entry, namespace)) for entry in hard}}
        if quota.get("status") != status:
            self.store.commit(("", "resourcequotas"), quota, {**quota, "status": status})


def _pod_spec_in(resource: Resource, item: Object) -> Object | None:
    spec = item.get("spec", {})
    if resource.plural == "pods":
        return spec
    if resource.plural == "cronjobs":
        spec = spec.get("jobTemplate", {}).get("spec", {})
    return spec.get("template", {}).get("spec") if resource.plural in ("jobs", "cronjobs", "deployments") else None


def _charge(entry: str, resource: Resource, item: Object) -> Decimal:
    """What one object takes of a quota's entry."""
    if entry.startswith("count/"):
        return Decimal(entry == f"count/{resource.qualified}")
    if resource.plural != "pods":
        return Decimal(entry == resource.plural and not resource.group)
    if item.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return Decimal(0)
    if entry == "pods":
        return Decimal(1)
    part, name = _quota_entry(entry)
    amounts = [c.get("resources", {}).get(part, {}).get(name, 0) for c in item["spec"]["containers"]]
    return sum((quantity(amount) for amount in amounts), Decimal(0))


def _quota_entry(entry: str) -> tuple[str, str]:
    """`limits.cpu` is (limits, cpu); a bare `cpu` counts requests."""
    part, _, name = entry.partition(".")
    return (part, name) if part in ("requests", "limits") else ("requests", entry)


def _unsaid(entry: str, pod: Object) -> bool:
    """Whether a quota's entry binds what some container of the pod leaves open."""
    part, name = _quota_entry(entry)
    containers = pod["spec"]["containers"]
    return name in ("cpu", "memory") and any(name not in c.get("resources", {}).get(part, {}) for c in containers)


def _plain(amount: Any) -> str:
    if not isinstance(amount, Decimal):
        return str(amount)
    return f"{amount.normalize():f}" if amount == amount.to_integral() else f"{amount * 1000:.0f}m"
