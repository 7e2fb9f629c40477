"""Stored documents as the API shows them: by where a value stands, so that no newer or odd row breaks an answer.

What is not there has the value that a recipe of today has by itself; what is of another form than ours is None.
"""

from collections.abc import Mapping
from typing import cast

from pydantic import ValidationError

from finetuning.contract.recipe import JobKind, OptimiserSettings, Recipe
from finetuning.contract.report import ParityCertificate, SafetyReport
from finetuning.contract.shelf import from_shelf

_USUAL = Recipe(name="", kind=JobKind.FINETUNE, base="", optimiser=OptimiserSettings(learning_rate=1.0)).model_dump(
    mode="json"
)


def mapping_at(stored: object, *path: str) -> Mapping[str, object]:
    """The object that stands there; an empty one where there is none."""
    for name in path:
        stored = stored.get(name) if isinstance(stored, Mapping) else None  # pyright: ignore[reportUnknownMemberType]
    return cast(Mapping[str, object], stored) if isinstance(stored, Mapping) else {}


def recipe_value(recipe: object, *path: str) -> object:
    """What a stored recipe has there."""
    usual: object = _USUAL
    found = recipe
    for name in path:
        if not isinstance(found, Mapping):
            return None
        usual = mapping_at(usual).get(name)
        found = cast(Mapping[str, object], found).get(name, usual)
    return found


def read_report(stored: object) -> SafetyReport | None:
    """A stored safety report; None where there is none, or none that this release can read."""
    try:
        return from_shelf(SafetyReport, mapping_at(stored)) if stored else None
    except ValidationError:
        return None


def read_certificate(stored: object) -> ParityCertificate | None:
    """A stored parity certificate; None where there is none, or none that this release can read."""
    try:
        return from_shelf(ParityCertificate, mapping_at(stored)) if stored else None
    except ValidationError:
        return None
