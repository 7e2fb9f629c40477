"""Stored documents, read leniently: what came in was judged at the door, by whichever release stored it.

A field that this release does not know is left out. `schema_version` says which form a document has; one without it is
of the first. Whoever changes what a document means raises the number, and whoever works on it refuses a higher one
(`app.core.jobs.lease.claim`).
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from pydantic import BaseModel

FIRST_VERSION = 1

_Document = TypeVar("_Document", bound=BaseModel)
_Part = TypeVar("_Part")


def from_shelf(kind: type[_Document], stored: Mapping[str, object] | str | bytes) -> _Document:
    """A stored document of that kind, from its JSON. Raises pydantic.ValidationError where it has not even the form."""
    found: object = json.loads(stored) if isinstance(stored, str | bytes) else stored
    if isinstance(found, Mapping) and "schema_version" in kind.model_fields:
        found = {"schema_version": FIRST_VERSION, **cast(Mapping[str, object], found)}
    return kind.model_validate(found, extra="ignore")


def part_from_shelf(kind: type[_Part], stored: Mapping[str, Any]) -> _Part:
    """A stored part that is a dataclass, from the fields of it that this release knows. Raises TypeError."""
    known = {field.name for field in fields(cast(Any, kind))}
    return kind(**{name: value for name, value in stored.items() if name in known})
