"""What ties fields of the document together, as rules in CEL, the language in which an API server checks objects.

A test holds them to what `parse_for_cluster` accepts.
"""

from pydantic import BaseModel

from launcher.resource.document import MAY_CHANGE
from prism_job.spec.cluster import MAX_PODS, NO_SECRET_NAME, SECRET_NAME
from prism_job.spec.document import RunSpec

ADDRESS = "must be s3://bucket/prefix, or an absolute path that podOverlay mounts"
DATA_ADDRESS = "must be s3://bucket/prefix, hf://datasets/ORG/NAME, or an absolute path that podOverlay mounts"
_IS_FORWARD_ONLY = "has(self.score) && self.score == 'representation'"
_SCORES_FORWARD_ONLY = "has(self.scoring) && has(self.scoring.score) && self.scoring.score == 'representation'"


def validation_rules() -> dict[str, list[dict[str, str]]]:
    """Path of a section within spec -> its rules; `[]` is an item of a list.

    An API server estimates what a rule can cost, and refuses a definition with a rule above 10 million steps, or with more
    than 100 million in all. A `matches` counts a tenth of the text's bytes (four a character) times a quarter of the
    expression's length, times the items of every list above it. The most expensive rule here, on the names of variables,
    counts about 0.2 million; addresses are compared by their first letters.
    """
    powers = [2**bits for bits in range(8, 25)]
    pods = f"{_or_default('cluster', 'groups')} * {_or_default('cluster', 'nodesPerGroup')}"
    return {
        "": [
            *(_is_immutable(name) for name in _field_names(RunSpec) if name not in MAY_CHANGE),
            _rule(
                "(has(self.retry) ? self.retry : 0) >= (has(oldSelf.retry) ? oldSelf.retry : 0)",
                "may only be raised: a number already used stands for a round that was run",
                ".retry",
            ),
            _rule(_is_address("self.store"), ADDRESS, ".store"),
            _rule(_is_address("self.output"), ADDRESS, ".output"),
            _rule(
                f"!({_SCORES_FORWARD_ONLY}) || !has(self.audit) || (has(self.audit.examples) && self.audit.examples == 0)",
                "score: representation has no audit; leave it out",
                ".audit",
            ),
            _rule(
                f"!({_SCORES_FORWARD_ONLY}) || !has(self.selection.dedupe) || self.selection.dedupe != 'near'",
                "score: representation has no signs of gradients to compare",
                ".selection",
            ),
        ],
        "model": _model(),
        "scoring": _scoring(),
        "scoring.preferenceModel": _model(),
        "candidates": [_rule(f"self.uris.all(uri, {_is_data_address('uri')})", f"each {DATA_ADDRESS}", ".uris")],
        "targets": [
            _rule("has(self.uris) != has(self.sets)", "give exactly one of uris, sets"),
            _rule(f"!has(self.uris) || self.uris.all(uri, {_is_data_address('uri')})", f"each {DATA_ADDRESS}", ".uris"),
            _rule(
                "!has(self.sets) || self.sets.all(one, self.sets.exists_one(other, other.name == one.name))",
                "two sets have the same name; give each its own",
                ".sets",
                "FieldValueDuplicate",
            ),
        ],
        "targets.sets[]": [_rule(f"self.uris.all(uri, {_is_data_address('uri')})", f"each {DATA_ADDRESS}", ".uris")],
        "extraction.codec": [
            _rule(f"!has(self.dims) || self.dims in {powers}", "must be a power of two: 32768 or 65536, say", ".dims")
        ],
        "extraction.deepspeed": [
            _rule(
                "!has(self.offload) || self.offload == 'none' || (has(self.stage) && self.stage == 3)",
                "offload needs stage: 3",
                ".offload",
            )
        ],
        "selection": [
            _rule("has(self.keep) != has(self.drop)", "give exactly one of keep, drop"),
            _rule("!(has(self.perSource) && has(self.perGroup))", "give at most one of perSource, perGroup"),
            _rule(
                "!has(self.nearAgreement) || (has(self.dedupe) && self.dedupe == 'near')",
                "nearAgreement needs dedupe: near",
            ),
        ],
        "selection.perSource": _shares(),
        "selection.perGroup": _shares(),
        "selection.budget": [
            _rule(
                "(has(self.count) ? 1 : 0) + (has(self.fraction) ? 1 : 0) + (has(self.tokens) ? 1 : 0) == 1",
                "give exactly one of count, fraction, tokens",
            )
        ],
        "cluster": [_rule(f"{pods} <= {MAX_PODS}", f"groups × nodesPerGroup: at most {MAX_PODS}", ".groups")],
        "cluster.env[]": [
            _rule("has(self.value) != has(self.valueFrom)", "give exactly one of value, valueFrom"),
            _rule(
                f"!has(self.value) || !self.name.matches('{SECRET_NAME}') || self.name.matches('{NO_SECRET_NAME}')",
                "a variable of this name is a secret: put it into a Secret and name that by valueFrom.secretKeyRef",
                ".value",
                "FieldValueForbidden",
            ),
        ],
    }


def _rule(rule: str, message: str, field: str = "", reason: str = "") -> dict[str, str]:
    """Without a reason the server reports FieldValueInvalid, without a field it names the section itself."""
    made = {"rule": rule, "message": message, "fieldPath": field, "reason": reason}
    return {key: value for key, value in made.items() if value}


def _is_immutable(name: str) -> dict[str, str]:
    required = {field.alias for field in RunSpec.model_fields.values() if field.is_required()} | {"cluster"}
    same = f"self.{name} == oldSelf.{name}"
    if name not in required:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    changing = ", ".join(MAY_CHANGE)
    message = f"cannot change while the run exists ({changing} can): submit it under another name, or delete this one"
    return _rule(same, message, f".{name}", "FieldValueForbidden")


def _model() -> list[dict[str, str]]:
    return [
        _rule(
            "!(self.uri.startsWith('.') || self.uri.startsWith('~') || self.uri.endsWith('.gguf')"
            f" || self.uri.contains('://')) || {_is_address('self.uri')}",
            "must be a hub id, s3://bucket/prefix, or an absolute path that podOverlay mounts",
            ".uri",
        ),
        _rule(f"!has(self.adapter) || {_is_address('self.adapter')}", ADDRESS, ".adapter"),
    ]


def _scoring() -> list[dict[str, str]]:
    has_no_gradients = {
        "weighting": "!has(self.weighting) || self.weighting == 'uniform'",
        "preferenceModel": "!has(self.preferenceModel)",
        "loss": "!has(self.loss) || self.loss == 'sum'",
        "curvature": "!has(self.curvature) || (has(self.curvature.kind) && self.curvature.kind == 'none')",
    }
    return [
        _rule(
            "!has(self.preferenceModel) || !has(self.weighting) || self.weighting == 'preference'",
            "preferenceModel needs weighting: preference; uniform weights do not use π",
        ),
        _rule(f"!has(self.similarity) || ({_IS_FORWARD_ONLY})", "similarity needs score: representation"),
        *(
            _rule(f"!({_IS_FORWARD_ONLY}) || {allowed}", f"score: representation has no gradients; leave {name} out")
            for name, allowed in has_no_gradients.items()
        ),
    ]


def _shares() -> list[dict[str, str]]:
    return [
        _rule("has(self.max) || has(self.min)", "give max, min, or both"),
        _rule("!has(self.max) || !has(self.min) || self.min <= self.max", "min must not be above max"),
    ]


def _is_address(field: str) -> str:
    return f"({field}.startsWith('/') || ({field}.startsWith('s3://') && {field}.size() > 5))"


def _is_data_address(field: str) -> str:
    """The form behind hf://datasets/ is checked when the run is read: a `matches` on every address would cost too much."""
    return f"({_is_address(field)} || ({field}.startsWith('hf://datasets/') && {field}.size() > 14))"


def _or_default(section: str, name: str) -> str:
    (annotation,) = (field.annotation for field in RunSpec.model_fields.values() if field.alias == section)
    (model,) = (option for option in getattr(annotation, "__args__", ()) if option is not type(None))
    (default,) = (field.default for field in model.model_fields.values() if field.alias == name)
    return f"(has(self.{name}) ? self.{name} : {default})"


def _field_names(model: type[BaseModel]) -> list[str]:
    return [str(field.alias) for field in model.model_fields.values()]
