"""The bodies of requests and replies, one module for each resource."""

from pydantic import BaseModel, ConfigDict


class RequestBody(BaseModel):
    """What every request body has in common: unknown fields and other types than the declared are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
