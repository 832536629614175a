"""The document that pods read, and the bounds of its overlay."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from launcher.render.run_objects import run_objects
from launcher.resource.document import pods_document, request_digest
from prism_job.errors import SpecError
from prism_job.spec.document import check_document, parse_spec
from tests.render.documents import DOCUMENTS, EVERYTHING, OWNER, Object, every_document, objects_of, run_of

# The document that the pods read


@every_document
def test_pods_read_the_submitted_request(document: str) -> None:
    run, (config, *_) = run_of(**DOCUMENTS[document]), objects_of(document)
    read = parse_spec(config["data"]["selection.yaml"], "selection.yaml")
    assert request_digest(read) == request_digest(run)
    assert pods_document(read) == pods_document(run)


def test_fields_that_may_change_change_nothing_that_pods_read() -> None:
    run = run_of(**EVERYTHING)
    changed = run.model_copy(
        update={
            "spec": run.spec.model_copy(
                update={"suspend": True, "retry": 4, "ttl_seconds_after_finished": 60, "gpu_hour_price": 3.5}
            )
        }
    )
    assert run_objects(changed, "team", OWNER) == run_objects(run, "team", OWNER)
    assert request_digest(changed) == request_digest(run)


def test_labels_and_annotations_are_no_part_of_the_request() -> None:
    assert request_digest(run_of(labels={"team": "maths"})) == request_digest(run_of())


# The overlay


def nested(levels: int, inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = {"a": inner} if levels % 2 else [inner]
    return inner


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"spec": nested(20)}, "is nested deeper than 20 levels"),
        ({"spec": nested(9_999)}, "is nested deeper than 20 levels"),
        ({"spec": nested(10_000)}, "is nested deeper than 20 levels"),
        ({"spec": {"x": "y" * 32_768}}, "has 32,785 bytes as JSON; at most 32,768"),
        ({"spec": [[]] * 40_000}, "has more than 32,768 entries"),
        ({"spec": float("nan")}, "not JSON compliant"),
        ({"spec": {(1, 2): 3}}, "is not JSON"),
    ],
)
def test_an_overlay_that_is_too_large_or_deep_is_refused(overlay: Object, message: str) -> None:
    document = run_of().to_document()
    document["spec"]["cluster"]["podOverlay"] = overlay
    with pytest.raises(SpecError, match=rf"spec\.cluster\.podOverlay: .*{message}"):
        check_document(document, "test")


def test_the_largest_and_deepest_overlay_is_accepted() -> None:
    for overlay in ({"spec": nested(19)}, {"spec": {"a": nested(18)}}, {"spec": {"x": "y" * (32_768 - 17)}}):
        assert run_of(podOverlay=overlay).spec.cluster.pod_overlay == overlay  # type: ignore[union-attr]


def test_the_yaml_of_the_document_has_no_aliases() -> None:
    config = objects_of("everything")[0]
    text = config["data"]["selection.yaml"]
    assert "größe 😀" in yaml.safe_load(text)["spec"]["candidates"]["uris"][1]
    assert "&id" not in text
