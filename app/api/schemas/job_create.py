"""The bodies of POSTs to jobs, and what core stores of a create.

Knows field names and the faults that a client can make in them; must not know rows or queries.
"""

from collections.abc import Callable
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from app.core.errors import InvalidRequest
from app.core.jobs import policy

_METADATA_PAIRS, _METADATA_KEY_CHARS, _METADATA_VALUE_CHARS = 16, 64, 512


def _whole_or_auto(low: int, high: int) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise ValueError(f'must be an integer from {low} to {high}, or "auto"')

    return check


def _multiplier(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 10):
        return value
    raise ValueError('must be a number above 0 and up to 10, or "auto"')


def _seed(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise PydanticCustomError("int_type", "must be an integer")
    if not 0 <= value < 2**31:
        raise ValueError("must lie within 0 and 2147483647")
    return value


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "must be an object of strings")
    pairs = cast(dict[str, object], value)
    if len(pairs) > _METADATA_PAIRS:
        raise ValueError(f"must have at most {_METADATA_PAIRS} pairs")
    for key, text in pairs.items():
        if not 1 <= len(key) <= _METADATA_KEY_CHARS:
            raise ValueError(f"keys must have 1 to {_METADATA_KEY_CHARS} characters")
        if not isinstance(text, str) or len(text) > _METADATA_VALUE_CHARS:
            raise ValueError(f"values must be strings of at most {_METADATA_VALUE_CHARS} characters")
    return cast(dict[str, str], value)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class HyperparametersBody(_Body):
    """The same three numbers, in either of the two places where a client may put them."""

    n_epochs: Annotated[int | Literal["auto"], PlainValidator(_whole_or_auto(1, 50))] = "auto"
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_whole_or_auto(1, 256))] = "auto"
    learning_rate_multiplier: Annotated[float | Literal["auto"], PlainValidator(_multiplier)] = "auto"


class SupervisedBody(_Body):
    """`method.supervised`."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(_Body):
    """`method`; dpo and reinforcement are read only to be refused by name."""

    type: StrictStr
    supervised: SupervisedBody | None = None
    dpo: dict[str, object] | None = None
    reinforcement: dict[str, object] | None = None


class CreateJobBody(_Body):
    """POST /v1/fine_tuning/jobs."""

    model: StrictStr
    training_file: StrictStr
    validation_file: StrictStr | None = None
    suffix: StrictStr | None = None
    seed: Annotated[int | None, PlainValidator(_seed)] = None
    metadata: Annotated[dict[str, str] | None, PlainValidator(_metadata)] = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: list[dict[str, object]] | None = None
    safety: policy.SafetyWish | None = None
    lora: policy.LoraWish | None = None
    dry_run: StrictBool = False


class EmptyBody(_Body):
    """The body of a cancel: nothing."""


def to_create_job(body: CreateJobBody) -> policy.CreateJob:
    """What core stores of a create. Raises InvalidRequest for methods and integrations that are not offered."""
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
    return policy.Hyperparameters.model_validate(old | new)


def _chosen(body: HyperparametersBody | None) -> dict[str, object]:
    return {} if body is None else body.model_dump(exclude_unset=True)
