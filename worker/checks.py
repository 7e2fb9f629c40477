"""Checks of uploaded files and of new jobs: what is wrong with the rows, and how many tokens they are.

Knows rows, a base's tokenizer and the two moves out of a check; must not import torch. A check is a pure function of
immutable bytes that ends in one conditional UPDATE, so it needs no lease and may run twice.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import structlog
from sqlalchemy.orm import Session

from app.core import files
from app.core.errors import ImmunotuneError, NotFound
from app.core.jobs import jobs
from app.core.jobs.jobs import JobError, NewEvent
from app.core.jobs.policy import CreateJob, get_policy, resolve_recipe
from app.core.models import get_base
from app.core.settings import Limits, Settings
from app.core.storage.blobs.folder import BlobMissing
from app.core.storage.database import JsonObject
from app.core.storage.tables import File, FileStatus, Job
from finetuning.contract.recipe import Recipe
from finetuning.rows.chat_format import NoChatTemplate, encode_row
from finetuning.rows.report import SHOWN_ERRORS
from finetuning.rows.scanner import InvalidRowError, Row, RowError, RowReport, RowScanner, rows_of
from worker.attempt.supervisor import Host
from worker.tokenizer import BaseTokenizer, BaseUnreadable

_log = structlog.get_logger(__name__)

_MOST_TOKENS_A_ROW = 2048
_LEAST_CONTEXT = 8  # what a recipe can express


@dataclass
class TokenCount:
    """What the rows of a file cost on one base, per epoch; `trained_tokens` are those to learn from."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    first_cut_line: int | None = None
    errors_total: int = 0
    errors: list[RowError] = field(default_factory=list[RowError])


class _Refused(Exception):
    """The job's check ends in this error."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.code)
        self.error = error


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


def check_file(host: Host, file_id: str) -> None:
    """Scan an uploaded file and set it `processed` or `error`; the jobs that wait for it are woken."""
    with host.database.reading() as session:
        file = files.find_unchecked(session, file_id)
    if file is None:
        return
    try:
        report = scan(host.blobs.read(file.blob_key), host.settings.limits)
    except BlobMissing:
        _log.warning("file.bytes_missing", file_id=file_id)  # the reaper ends its check in time
        return
    status: Literal[FileStatus.PROCESSED, FileStatus.ERROR]
    status = FileStatus.PROCESSED if report.is_valid else FileStatus.ERROR
    with host.database.writing() as session:
        wakes = files.set_validation(
            session, file_id, status, validation=report.to_json(SHOWN_ERRORS), details=report.message or None
        )
        session.commit()
    _log.info("file.checked", file_id=file_id, status=status, rows=report.rows, errors=report.errors_total)
    host.wake(wakes)


def check_job(host: Host, job_id: str) -> None:
    """Judge a new job's files against its base and move it to `queued` or `failed`.

    Leaves it as it is while a file is unchecked or the base is not on this host: it is woken again.
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
    with host.database.writing() as session:
        if jobs.find_unchecked(session, job_id) is not None:
            jobs.append_events(session, job_id, notes)
        wakes = jobs.pass_checks(session, job_id, recipe)
        session.commit()
    _log.info("job.passed", job_id=job_id, steps=recipe.steps)
    host.wake(wakes)


def scan(chunks: Iterable[bytes], limits: Limits) -> RowReport:
    """The report of a file's bytes; its file code is `validation_timeout` when the check takes longer than allowed."""
    scanner = RowScanner(max_file_bytes=limits.file_bytes, max_rows=limits.rows_max)
    started = time.monotonic()
    for chunk in chunks:
        scanner.feed(chunk)
        if time.monotonic() - started > limits.check_seconds:
            message = f"checking took longer than {limits.check_seconds:g} s; split the file"
            late = RowError(1, 1, "", "validation_timeout", message)
            return RowReport(None, 0, 0, (late,), 1, (), 0, file_code="validation_timeout")
    return scanner.close()


def count_tokens(tokenizer: BaseTokenizer, rows: Iterable[Row], *, max_tokens: int) -> TokenCount:
    """Encode every row as training will; rows are cut at `max_tokens`.

    A row that keeps no trained token, or whose roles the base's template refuses, is an error. Raises
    InvalidRowError.
    """
    count = TokenCount()
    for row in rows:
        count.rows += 1
        try:
            encoded = encode_row(tokenizer, row.messages, max_tokens=max_tokens)
        except NoChatTemplate as refusal:
            _add_error(count, RowError(row.line, 1, "/messages", "invalid_role", str(refusal)))
            continue
        count.tokens += len(encoded.ids)
        count.longest = max(count.longest, len(encoded.ids))
        count.trained_tokens += encoded.target_tokens
        if encoded.truncated:
            count.cut_rows += 1
            count.first_cut_line = count.first_cut_line or row.line
        if encoded.target_tokens == 0:
            advice = f"nothing to learn from is left in the first {max_tokens} tokens; shorten what comes before"
            _add_error(count, RowError(row.line, 1, "/messages", "no_trainable_tokens", advice))
    return count


def with_room(recipe: Recipe, max_tokens: int) -> Recipe:
    """The recipe for rows of up to `max_tokens`: longer ones go through the model fewer at a time, to the same step."""
    rows = max(1, min(recipe.micro_batch_size, recipe.micro_batch_size * recipe.max_tokens // max_tokens))
    return recipe.model_copy(update={"max_tokens": max_tokens, "micro_batch_size": rows})


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their LF from pieces of any size."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _open_case(settings: Settings, session: Session, job_id: str) -> _Case | None:
    """The job and its files; None when it is no longer there to be checked, or its files are not checked yet."""
    job = jobs.find_unchecked(session, job_id)
    if job is None or job.training_file is None:
        return None
    training = _file_of(session, job, job.training_file, "training_file")
    validation = None
    if job.validation_file is not None:
        validation = _file_of(session, job, job.validation_file, "validation_file")
    fetched = settings.data / "bases" / job.base_id
    folder = fetched if fetched.is_dir() else Path(get_base(session, job.base_id).source)
    case = _Case(job, training, validation, folder)
    is_waiting = any(file.status == FileStatus.UPLOADED for _, file in case.files())
    return None if is_waiting else case


def _file_of(session: Session, job: Job, file_id: str, param: str) -> File:
    try:
        return files.get_file(session, job.project_id, file_id)
    except NotFound as gone:
        raise _Refused(JobError(f"invalid_{param}", gone.message, param)) from gone


def _judge(host: Host, case: _Case) -> tuple[Recipe, list[NewEvent]]:
    """The recipe for the rows as counted, and what the client should know. Raises _Refused."""
    for param, file in case.files():
        _refuse_unusable(param, file)
    rows = jobs.count_rows(case.training) or 0
    job = case.job
    try:
        jobs.check_row_count(rows, host.settings.limits.rows_min)
        request = CreateJob.model_validate_json(json.dumps(job.request))
        recipe = resolve_recipe(get_policy(job.policy, queue=job.queue), job.base_id, request, rows=rows)
    except ImmunotuneError as wrong:
        raise _Refused(JobError(wrong.code, wrong.message, wrong.param)) from wrong
    tokenizer = BaseTokenizer(case.base_folder)
    room = _tokens_a_row(case.base_folder, recipe.max_tokens)
    longest = 0
    notes: list[NewEvent] = []
    for param, file in case.files():
        count = _count_file(host, tokenizer, file, param, max_tokens=room)
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


def _refuse_unusable(param: str, file: File) -> None:
    found = file.validation or {}
    if file.status == FileStatus.ERROR:
        details: JsonObject = {key: found.get(key) for key in ("errors_total", "truncated", "errors")}
        message = file.status_details or "The file is not valid."
        raise _Refused(JobError(f"invalid_{param}", message, param, details))
    if found.get("format") == "dpo":
        message = "The file holds preference pairs; the supervised method needs chat or completion rows."
        raise _Refused(JobError(f"invalid_{param}", message, param))
    line = found.get("first_tools_line")
    if isinstance(line, int):
        message = "this base has no tools; remove tools, tool calls and tool messages"
        raise _invalid(param, [RowError(line, 1, "", "tools_not_supported", message)], 1)


def _count_file(host: Host, tokenizer: BaseTokenizer, file: File, param: str, *, max_tokens: int) -> TokenCount:
    rows = rows_of(lines_of(host.blobs.read(file.blob_key)))
    try:
        count = count_tokens(tokenizer, rows, max_tokens=max_tokens)
    except InvalidRowError as wrong:
        raise _Refused(JobError(f"invalid_{param}", f"The file cannot be used: {wrong}.", param)) from wrong
    if count.errors:
        raise _invalid(param, count.errors, count.errors_total)
    return count


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


def _add_error(count: TokenCount, error: RowError) -> None:
    count.errors_total += 1
    if len(count.errors) < SHOWN_ERRORS:
        count.errors.append(error)
