"""The check of a new job: whether its rows can be trained on its base, and how long they are there. No torch.

A check is a pure function of immutable bytes that ends in one conditional UPDATE, so it needs no lease and may run
twice. While it works it says so, that nobody is woken for the same; it stops when the job has moved on.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import structlog
from sqlalchemy.orm import Session

from app.core import files
from app.core.jobs import jobs
from app.core.jobs.jobs import JobError, NewEvent
from app.core.models import get_base
from app.core.settings import Settings
from app.core.storage.blobs import BlobMissing, BlobStore
from app.core.storage.database import JsonObject
from app.core.storage.tables import File, Job
from finetuning.contract.recipe import Recipe
from finetuning.contract.shelf import from_shelf
from finetuning.rows.scanner import InvalidRowError, Row, RowError, rows_of
from worker.attempt.supervisor import Host
from worker.token_count import TokenCount, count_tokens, lines_of
from worker.tokenizer import BaseTokenizer, BaseUnreadable

_log = structlog.get_logger(__name__)

_MOST_TOKENS_A_ROW = 2048
_LEAST_CONTEXT = 8  # what a recipe can express


class _Refused(Exception):
    """The job's check ends in this error."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.code)
        self.error = error


class _Held(Exception):
    """The time of a check went by in waiting."""


class _MovedOn(Exception):
    """The job is no longer there to be checked."""


@dataclass(frozen=True)
class _Case:
    """A job with all that its check reads; `validation` is None when the job has no validation file."""

    job: Job
    training: File
    validation: File | None
    base_folder: Path

    def files(self) -> list[tuple[str, File]]:
        found = [("training_file", self.training)]
        return found if self.validation is None else [*found, ("validation_file", self.validation)]


def check_job(host: Host, job_id: str) -> None:
    """Judge a new job's files against its base and move it to `queued` or `failed`.

    Leaves it as it is while the base is not on this host: it is woken again.
    """
    try:
        with host.database.reading() as session:
            case = _open_case(host.settings, session, job_id)
        if case is None:
            return
        recipe, notes = _judge(host, case)
    except _Refused as refused:
        with host.database.writing() as session:
            jobs.fail_checks(session, job_id, refused.error)
            session.commit()
        _log.info("job.refused", job_id=job_id, code=refused.error.code)
        return
    except (BaseUnreadable, BlobMissing) as absent:
        _log.warning("job.check_waits", job_id=job_id, reason=str(absent))
        return
    except _Held:
        _log.warning("job.check_waits", job_id=job_id, reason="store or database took the time of a check")
        return
    except _MovedOn:
        _log.info("job.moved_on", job_id=job_id)
        return
    with host.database.writing() as session:
        if jobs.find_unchecked(session, job_id) is not None:
            jobs.append_events(session, job_id, notes)
        wakes = jobs.pass_checks(session, job_id, recipe)
        session.commit()
    _log.info("job.passed", job_id=job_id, epochs=recipe.epochs)
    host.wake(wakes)


def with_room(recipe: Recipe, max_tokens: int) -> Recipe:
    """The recipe for rows of up to `max_tokens`: longer ones go through the model fewer at a time, to the same step."""
    rows = max(1, min(recipe.micro_batch_size, recipe.micro_batch_size * recipe.max_tokens // max_tokens))
    return recipe.model_copy(update={"max_tokens": max_tokens, "micro_batch_size": rows})


def _open_case(settings: Settings, session: Session, job_id: str) -> _Case | None:
    """The job and its files; None when it is no longer there to be checked."""
    job = jobs.find_unchecked(session, job_id)
    if job is None or job.training_file is None:
        return None
    training = files.get_file(session, job.project_id, job.training_file)
    validation = None
    if job.validation_file is not None:
        validation = files.get_file(session, job.project_id, job.validation_file)
    fetched = settings.data / "bases" / job.base_id
    folder = fetched if fetched.is_dir() else Path(get_base(session, job.base_id).source)
    return _Case(job, training, validation, folder)


def _judge(host: Host, case: _Case) -> tuple[Recipe, list[NewEvent]]:
    """The job's recipe for rows as long as these, and what the client should know. Raises _Refused."""
    for param, file in case.files():
        _refuse_tools(param, file)
    recipe = from_shelf(Recipe, case.job.recipe)
    tokenizer = BaseTokenizer(case.base_folder)
    room = _tokens_a_row(case.base_folder, recipe.max_tokens)
    longest = 0
    notes: list[NewEvent] = []
    watched = _watched(host, case.job.id)
    for param, file in case.files():
        count = _count_file(watched, host.blobs, tokenizer, (param, file), max_tokens=room)
        notes += _notes_of(count, param, max_tokens=room)
        longest = max(longest, count.longest)
    recipe = with_room(recipe, min(room, max(longest, recipe.max_tokens)))
    if case.validation is not None and case.validation.sha256 == case.training.sha256:
        text = "The validation file is the training file, so its figures say nothing about new rows"
        notes.append(NewEvent(text, level="warn", data={"code": "train_validation_overlap"}))
    return recipe, notes


def _tokens_a_row(base_folder: Path, usual: int) -> int:
    """How long a row may be: the base's own context as far as one row of it fits in memory; `usual` if it says none."""
    try:
        said = cast(object, json.loads((base_folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return usual
    context = cast(dict[str, object], said).get("max_position_embeddings") if isinstance(said, dict) else None
    return min(context, _MOST_TOKENS_A_ROW) if isinstance(context, int) and context >= _LEAST_CONTEXT else usual


def _refuse_tools(param: str, file: File) -> None:
    line = (file.validation or {}).get("first_tools_line")
    if isinstance(line, int):
        message = "this base has no tools; remove tools, tool calls and tool messages"
        raise _invalid(param, [RowError(line, 1, "", "tools_not_supported", message)], 1)


def _count_file(
    watched: Callable[[Iterable[Row]], Iterable[Row]],
    blobs: BlobStore,
    tokenizer: BaseTokenizer,
    named: tuple[str, File],
    *,
    max_tokens: int,
) -> TokenCount:
    param, file = named
    rows = watched(rows_of(lines_of(blobs.read(file.blob_key))))
    try:
        count = count_tokens(tokenizer, rows, max_tokens=max_tokens)
    except InvalidRowError as wrong:
        raise _Refused(JobError(f"invalid_{param}", f"The file cannot be used: {wrong}.", param)) from wrong
    if count.errors:
        raise _invalid(param, count.errors, count.errors_total)
    return count


def _watched(host: Host, job_id: str) -> Callable[[Iterable[Row]], Iterable[Row]]:
    """Rows that pass through while the check may go on. Raises _MovedOn; _Refused after `check_seconds` of work.

    Time that store or database took is no fault of the rows: then _Held, and the job is checked again.
    """
    limit = host.settings.limits.check_seconds
    begin, worked_before = time.monotonic(), time.thread_time()
    said = -host.settings.lease.rewake_seconds

    def watch(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal said
        for row in rows:
            passed = time.monotonic() - begin
            if time.thread_time() - worked_before > limit:
                raise _too_long(limit)
            if passed > limit:
                raise _Held
            if passed - said > host.settings.lease.rewake_seconds / 3:
                said = passed
                _say_working(host, job_id)
            yield row

    return watch


def _too_long(seconds: float) -> _Refused:
    text = f"The rows were not counted within {seconds:g} seconds. Send fewer or shorter ones."
    return _Refused(JobError("invalid_training_file", text, "training_file"))


def _say_working(host: Host, job_id: str) -> None:
    with host.database.writing() as session:
        is_there = jobs.keep_unchecked(session, job_id)
        session.commit()
    if not is_there:
        raise _MovedOn


def _invalid(param: str, errors: Sequence[RowError], total: int) -> _Refused:
    first = errors[0]
    noun = "row" if total == 1 else "rows"
    message = f"{total} invalid {noun}. First: line {first.line}: {first.message}"
    details: JsonObject = {
        "errors_total": total,
        "truncated": total > len(errors),
        "errors": [error.to_json() for error in errors],
    }
    return _Refused(JobError(f"invalid_{param}", message[:512], param, details))


def _notes_of(count: TokenCount, param: str, *, max_tokens: int) -> list[NewEvent]:
    name = param.replace("_", " ").capitalize()
    data: JsonObject = {"rows": count.rows, "tokens": count.tokens, "trained_tokens": count.trained_tokens}
    text = f"{name}: {count.rows} rows, {count.tokens} tokens, {count.trained_tokens} of them to learn from"
    notes = [NewEvent(text, data=data)]
    if count.cut_rows:
        text = f"{name}: {count.cut_rows} rows are cut at {max_tokens} tokens; the first is line {count.first_cut_line}"
        cut: JsonObject = {"code": "example_too_long", "rows": count.cut_rows, "line": count.first_cut_line}
        notes.append(NewEvent(text, level="warn", data=cut))
    return notes
