"""The bodies of POSTs to jobs, and what is stored of a create."""

from typing import Annotated, cast

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from app.api.schemas import RequestBody
from app.core.errors import InvalidRequest
from app.core.jobs import policy

METADATA_PAIRS, METADATA_KEY_CHARS, METADATA_VALUE_CHARS = 16, 64, 512


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("code:invalid_type", "must be an object of strings")
    pairs = cast(dict[str, object], value)
    if len(pairs) > METADATA_PAIRS:
        raise ValueError(f"must have at most {METADATA_PAIRS} pairs")
    for key, text in pairs.items():
        if not 1 <= len(key) <= METADATA_KEY_CHARS:
            raise ValueError(f"keys must have 1 to {METADATA_KEY_CHARS} characters")
        if not isinstance(text, str) or len(text) > METADATA_VALUE_CHARS:
            raise ValueError(f"values must be strings of at most {METADATA_VALUE_CHARS} characters")
    return cast(dict[str, str], value)


class SupervisedBody(RequestBody):
    """`method.supervised`."""

    hyperparameters: policy.Hyperparameters | None = None


class MethodBody(RequestBody):
    """`method`; dpo and reinforcement are read only to be refused by name."""

    type: str
    supervised: SupervisedBody | None = None
    dpo: dict[str, object] | None = None
    reinforcement: dict[str, object] | None = None


class CreateJobBody(RequestBody):
    """POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: policy.Seed | None = None
    metadata: Annotated[dict[str, str] | None, PlainValidator(_metadata)] = None
    method: MethodBody | None = None
    hyperparameters: policy.Hyperparameters | None = None
    integrations: list[dict[str, object]] | None = None
    safety: policy.SafetyWish | None = None
    lora: policy.LoraWish | None = None
    dry_run: bool = False


class EmptyBody(RequestBody):
    """The body of a cancel: nothing."""


def to_create_job(body: CreateJobBody) -> policy.CreateJob:
    """What is stored of a create. Raises InvalidRequest for methods and integrations that are not offered."""
    if body.integrations:
        raise InvalidRequest(
            "No integration is set up on this server. Leave integrations out.",
            code="integration_not_configured",
            param="integrations",
        )
    if body.dry_run:
        raise InvalidRequest("dry_run is not offered yet.", code="unsupported_parameter", param="dry_run")
    _check_method(body.method)
    return policy.CreateJob(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed or 0,
        hyperparameters=_merge_hyperparameters(body),
        lora=body.lora,
        safety=body.safety,
        metadata=body.metadata,
    )


def _check_method(method: MethodBody | None) -> None:
    if method is None:
        return
    if method.type not in {"supervised", "dpo", "reinforcement"}:
        raise InvalidRequest("method.type must be supervised.", code="invalid_value", param="method.type")
    for name in ("supervised", "dpo", "reinforcement"):
        if name != method.type and getattr(method, name) is not None:
            raise InvalidRequest(
                f"method.{name} does not go with method.type {method.type!r}.",
                code="invalid_value",
                param=f"method.{name}",
            )
    if method.type != "supervised":
        raise InvalidRequest(
            f"The method {method.type!r} is not offered here; use supervised.",
            code="unsupported_method",
            param="method.type",
        )


def _merge_hyperparameters(body: CreateJobBody) -> policy.Hyperparameters:
    supervised = body.method.supervised if body.method else None
    old, new = _chosen(body.hyperparameters), _chosen(supervised.hyperparameters if supervised else None)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise InvalidRequest(
                f"hyperparameters.{name} and method.supervised.hyperparameters.{name} differ. Send one of them.",
                code="conflicting_hyperparameters",
                param=f"hyperparameters.{name}",
            )
    return policy.Hyperparameters().model_copy(update=old | new)


def _chosen(body: policy.Hyperparameters | None) -> dict[str, object]:
    return {} if body is None else body.model_dump(exclude_unset=True)
