"""`prism schedule`: an early error for a wrong schedule, and a CronJob that retries what is transient and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from launcher.cli import exit_codes
from launcher.render.cron_job import FINAL_PRISM_CODES, TIMEOUT_SECONDS, check_schedule, cron_job
from launcher.resource.document import parse_for_cluster
from launcher.resource.names import LONGEST_NAME, RUN_LABEL
from prism_job.errors import SpecError
from tests.cluster.server.podsecurity import violations
from tests.k8s.validation import validate
from tests.run_document import run_document

TEXT = "# a comment that the pod is to see too\n" + yaml.safe_dump(run_document("nightly-math"))


def objects(text: str = TEXT, cron: str = "0 2 * * *", **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    run = parse_for_cluster(text, "test")
    document, job = cron_job(run, text, "team-a", cron, image="registry/launcher:1", **options)
    return document, job


@pytest.mark.parametrize(
    "cron", ["@daily", "@yearly", "* * * * *", "*/15 0-6,22-23 1,15 * 1-5", "30 6 * JAN-mar Mon-FRI"]
)
def test_a_schedule_of_five_fields_or_a_macro_is_accepted(cron: str) -> None:
    check_schedule(cron, "Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "time_zone", "message"),
    [
        ("", None, "five fields"),
        ("0 2 * *", None, "five fields"),
        ("0 0 2 * * *", None, "five fields"),
        ("@every 1h", None, "five fields"),
        ("@nightly", None, "five fields"),
        ("TZ=UTC 0 2 * * *", None, "five fields"),
        *(("@daily", zone, "no time zone") for zone in ("", "Local", "Europe/Berlin; rm", "+02:00", "a/b/c/d")),
    ],
)
def test_the_usual_mistakes_in_a_schedule_have_an_early_error(cron: str, time_zone: str | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        objects(cron=cron, time_zone=time_zone)


def test_the_pod_reads_the_document_as_it_was_written() -> None:
    document, job = objects()
    assert document["data"] == {"selection.yaml": TEXT}
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == document["metadata"]["name"]
    assert pod["containers"][0]["args"] == ["submit", "--wait", "--namespace=team-a", "/etc/prism/selection.yaml"]
    assert document["metadata"]["namespace"] == job["metadata"]["namespace"] == "team-a"


def test_the_longest_name_of_a_run_fits() -> None:
    _, job = objects(TEXT.replace("nightly-math", "n" * LONGEST_NAME))
    assert len(job["metadata"]["name"]) <= 52


def test_an_eviction_is_retried_and_a_failed_run_is_not() -> None:
    _, job = objects()
    final, eviction = job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    values = final["onExitCodes"]["values"]
    assert final["action"] == "FailJob"
    assert {3, 100} <= set(values)
    assert not {0, 1, 137, 143} & set(values)
    assert values == sorted(values)
    assert eviction == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_schedule_forbids_concurrent_runs() -> None:
    _, job = objects(time_zone="Europe/Berlin")
    spec = job["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"], spec["schedule"]) == ("Forbid", "Europe/Berlin", "0 2 * * *")
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == TIMEOUT_SECONDS


def test_no_object_of_a_schedule_has_the_labels_of_a_run() -> None:
    text = json.dumps(objects())
    assert RUN_LABEL not in text
    assert "app.kubernetes.io/managed-by" not in text


def test_the_pod_is_restricted_and_its_root_read_only() -> None:
    _, job = objects()
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert violations(pod) == []
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"name": "tmp", "mountPath": "/tmp"} in pod["containers"][0]["volumeMounts"]


def test_the_yaml_has_no_aliases() -> None:
    assert "&id" not in yaml.safe_dump_all(objects(), sort_keys=False)


def test_a_document_too_large_for_a_config_map_is_refused() -> None:
    with pytest.raises(SpecError, match="bytes"):
        objects(TEXT + "#" * 1_000_000)


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.33", "1.35"])
def test_each_version_of_kubernetes_has_these_fields(version: str) -> None:
    for one in objects(time_zone="Etc/UTC"):
        validate(one, version)


def test_the_codes_that_are_not_retried_are_the_final_codes_of_the_command() -> None:
    wrong_usage = 2
    final = {wrong_usage, exit_codes.PREFLIGHT_FAILED, exit_codes.RUN_FAILED, exit_codes.NOT_FINISHED}
    assert set(FINAL_PRISM_CODES) == final | {exit_codes.NOT_FOUND, exit_codes.CANCELLED}
