"""The *restricted* Pod Security profile, as a list of named rules over a pod's spec. Knows nothing of servers or namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Spec = dict[str, Any]
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "projected", "secret"}
VOLUMES |= {"persistentVolumeClaim"}
_PORTS = {"ip_local_port_range", "ip_unprivileged_port_start", "ip_local_reserved_ports", "ping_group_range"}
_TCP = {"tcp_syncookies", "tcp_keepalive_time", "tcp_fin_timeout", "tcp_keepalive_intvl", "tcp_keepalive_probes"}
SYSCTLS = {"kernel.shm_rmid_forced", *(f"net.ipv4.{name}" for name in _PORTS | _TCP)}


def violations(pod_spec: Spec) -> list[str]:
    """What keeps a pod of this spec out of a namespace that enforces *restricted*; empty if nothing does."""
    return [text for rule in RULES if (text := rule(pod_spec))]


def _containers(spec: Spec) -> Iterator[tuple[str, Spec]]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind) or ():
            yield container.get("name", ""), container.get("securityContext") or {}


def _quoted(names: list[str], noun: str = "container") -> str:
    plural = "s" if len(names) > 1 else ""
    return f"{noun}{plural} " + ", ".join(f'"{name}"' for name in names)


def _pod(spec: Spec) -> Spec:
    return spec.get("securityContext") or {}


def host_namespaces(spec: Spec) -> str:
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    return f"host namespaces ({', '.join(f'{name}=true' for name in found)})" if found else ""


def host_ports(spec: Spec) -> str:
    found, ports = [], []
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        if bound := [port["hostPort"] for port in container.get("ports") or () if port.get("hostPort")]:
            found.append(container.get("name", ""))
            ports += bound
    listed = ", ".join(str(port) for port in ports)
    use = "use hostPorts" if len(found) > 1 else "uses hostPorts" if len(ports) > 1 else "uses hostPort"
    return f"hostPort ({_quoted(found)} {use} {listed})" if found else ""


def privileged(spec: Spec) -> str:
    found = [name for name, context in _containers(spec) if context.get("privileged")]
    return f"privileged ({_quoted(found)} must not set securityContext.privileged=true)" if found else ""


def privilege_escalation(spec: Spec) -> str:
    found = [name for name, context in _containers(spec) if context.get("allowPrivilegeEscalation") is not False]
    text = "must set securityContext.allowPrivilegeEscalation=false"
    return f"allowPrivilegeEscalation != false ({_quoted(found)} {text})" if found else ""


def capabilities(spec: Spec) -> str:
    keep, add, added = [], [], set()
    for name, context in _containers(spec):
        entry = context.get("capabilities") or {}
        if "ALL" not in (entry.get("drop") or ()):
            keep.append(name)
        if more := set(entry.get("add") or ()) - {"NET_BIND_SERVICE"}:
            add.append(name)
            added |= more
    parts = [f'{_quoted(keep)} must set securityContext.capabilities.drop=["ALL"]'] if keep else []
    listed = ", ".join(f'"{name}"' for name in sorted(added))
    parts += [f"{_quoted(add)} must not include {listed} in securityContext.capabilities.add"] if add else []
    return f"unrestricted capabilities ({'; '.join(parts)})" if parts else ""


def volume_types(spec: Spec) -> str:
    found = [volume.get("name", "") for volume in spec.get("volumes") or () if volume.keys() - VOLUMES - {"name"}]
    kinds = sorted({kind for volume in spec.get("volumes") or () for kind in volume.keys() - VOLUMES - {"name"}})
    text = ", ".join(f'"{kind}"' for kind in kinds)
    use = "use restricted volume types" if len(found) > 1 else "uses restricted volume type"
    return f"restricted volume types ({_quoted(found, 'volume')} {use} {text})" if found else ""


def run_as_non_root(spec: Spec) -> str:
    default = _pod(spec).get("runAsNonRoot")
    if found := [name for name, context in _containers(spec) if context.get("runAsNonRoot") is False]:
        return f"runAsNonRoot != true ({_quoted(found)} must not set securityContext.runAsNonRoot=false)"
    found = [name for name, context in _containers(spec) if context.get("runAsNonRoot", default) is not True]
    text = "must set securityContext.runAsNonRoot=true"
    return f"runAsNonRoot != true (pod or {_quoted(found)} {text})" if found else ""


def run_as_user(spec: Spec) -> str:
    found = [name for name, context in _containers(spec) if context.get("runAsUser") == 0]
    whole = ["pod"] if _pod(spec).get("runAsUser") == 0 else []
    who = " and ".join(whole + ([_quoted(found)] if found else []))
    return f"runAsUser=0 ({who} must not set runAsUser=0)" if who else ""


def seccomp(spec: Spec) -> str:
    fine, pod = ("RuntimeDefault", "Localhost"), (_pod(spec).get("seccompProfile") or {}).get("type")
    types = {name: (context.get("seccompProfile") or {}).get("type") for name, context in _containers(spec)}
    if found := [name for name, kind in types.items() if kind not in (None, *fine)]:
        text = f'must not set securityContext.seccompProfile.type to "{types[found[0]]}"'
        return f"seccompProfile ({_quoted(found)} {text})"
    found = [name for name, kind in types.items() if (kind or pod) not in fine]
    text = 'must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
    return f"seccompProfile (pod or {_quoted(found)} {text})" if found else ""


def proc_mount(spec: Spec) -> str:
    found = [name for name, context in _containers(spec) if context.get("procMount", "Default") != "Default"]
    return f"procMount ({_quoted(found)} must not set securityContext.procMount)" if found else ""


def selinux(spec: Spec) -> str:
    contexts = [_pod(spec), *(context for _, context in _containers(spec))]
    options = [context.get("seLinuxOptions") or {} for context in contexts]
    types = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    bad = any(entry.get("user") or entry.get("role") or entry.get("type", "") not in types for entry in options)
    return "seLinuxOptions (pod or containers set forbidden securityContext.seLinuxOptions)" if bad else ""


def apparmor(spec: Spec) -> str:
    contexts = [_pod(spec), *(context for _, context in _containers(spec))]
    bad = any((context.get("appArmorProfile") or {}).get("type") == "Unconfined" for context in contexts)
    return 'appArmorProfile (must not set AppArmor profile type to "Unconfined")' if bad else ""


def sysctls(spec: Spec) -> str:
    found = sorted({entry["name"] for entry in _pod(spec).get("sysctls") or ()} - SYSCTLS)
    return f"forbidden sysctls ({', '.join(found)})" if found else ""


def windows_host_process(spec: Spec) -> str:
    contexts = [_pod(spec), *(context for _, context in _containers(spec))]
    bad = any((context.get("windowsOptions") or {}).get("hostProcess") for context in contexts)
    return "hostProcess (pod or containers must not set securityContext.windowsOptions.hostProcess=true)" if bad else ""


RULES: tuple[Callable[[Spec], str], ...] = (
    *(host_namespaces, host_ports, privileged, privilege_escalation, capabilities, volume_types, run_as_non_root),
    *(run_as_user, seccomp, proc_mount, selinux, apparmor, sysctls, windows_host_process),
)
"""Each says what a pod does wrong, or nothing. The profile's version is the latest; Windows pods have no exemption here."""
