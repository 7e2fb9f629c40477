"""Path parameters: one raw segment, decoded once, matched against the shape of its id.

A wrong shape and an absent id get the same answer.
"""

from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from app.core.errors import model_not_found, not_found
from app.core.ids import Prefix, is_id

MAX_MODEL_CHARS = 160


def _file_id(segment: str) -> str:
    value = unquote(segment)
    if not is_id(Prefix.FILE, value):
        raise not_found("file", _shown(value))
    return value


def _job_id(segment: str) -> str:
    value = unquote(segment)
    if not is_id(Prefix.JOB, value):
        raise not_found("fine-tuning job", _shown(value))
    return value


def _model_name(segment: str) -> str:
    value = unquote(segment)
    if len(value) > MAX_MODEL_CHARS or not value.isprintable():
        raise model_not_found(_shown(value))
    return value


def _shown(value: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in value)


FileId = Annotated[str, AfterValidator(_file_id)]
JobId = Annotated[str, AfterValidator(_job_id)]
ModelName = Annotated[str, AfterValidator(_model_name)]
