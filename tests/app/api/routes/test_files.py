"""Lists of files: long ones, and those of files with much to say."""

import json

from app.core import files
from app.core.ids import Prefix, new_id
from app.core.settings import LimitSettings
from app.core.storage.blobs import Blob
from app.core.storage.tables import FileStatus
from finetuning.rows.report import SHOWN_ERRORS
from tests.support.http import Customer, chat_row

BAD = chat_row(weight=7) + b"\n"


def add_files(customer: Customer, count: int) -> list[str]:
    """Ids of files whose checks found much, without the bytes that nobody reads here."""
    errors = [{"line": line, "column": 1, "path": "/x", "code": "invalid_weight", "message": "m"} for line in range(50)]
    found = {"format": "chat", "rows": 50, "errors_total": 50, "truncated": False, "errors": errors, "warnings": errors}
    ids = [new_id(Prefix.FILE) for _ in range(count)]
    with customer.served.database.writing() as session:
        for file_id in ids:
            blob = Blob(files.blob_key(customer.project.id, file_id), 1, "0" * 64)
            new = files.NewFile(file_id, blob, "t.jsonl", FileStatus.ERROR, dict(found))
            files.add_file(session, customer.project.id, new, limits=LimitSettings())
        session.commit()
    return ids


def test_a_list_shows_the_first_errors_and_the_file_more(customer: Customer) -> None:
    """S5 c: a page of bad files is small; all that was found has a route of its own."""
    file_id = customer.upload(BAD * 300).json()["id"]
    [item] = customer.http.get("/files").json()["data"]
    shown = item["validation"]
    assert [error["line"] for error in shown["errors"]] == [1, 2, 3]
    assert (shown["errors_total"], shown["truncated"], shown["rows"], len(shown["warnings"])) == (300, True, 300, 3)
    alone = customer.http.get(f"/files/{file_id}").json()["validation"]
    assert len(alone["errors"]) == SHOWN_ERRORS
    whole = customer.http.get(f"/files/{file_id}/validation")
    assert whole.headers["content-type"] == "application/json"
    assert [error["line"] for error in whole.json()["errors"]] == list(range(1, 301))
    assert set(whole.json()) == set(alone)
    assert whole.json()["truncated"] is False
    customer.http.delete(f"/files/{file_id}").raise_for_status()
    assert customer.http.get(f"/files/{file_id}/validation").status_code == 404


def test_a_file_without_a_report_shows_what_it_has(customer: Customer) -> None:
    [file_id] = add_files(customer, 1)
    assert len(customer.http.get(f"/files/{file_id}/validation").json()["errors"]) == 50


def test_a_page_has_100_files_unless_more_are_asked_for(customer: Customer) -> None:
    """S5 c: and a long page comes bit by bit, each file once, and says what follows."""
    ids = add_files(customer, 250)
    newest = ids[::-1]
    first = customer.http.get("/files").json()
    assert ([item["id"] for item in first["data"]], first["has_more"]) == (newest[:100], True)
    for limit in (99, 100, 101, 199, 200, 201, 249, 250, 10_000):
        reply = customer.http.get("/files", params={"limit": limit})
        assert reply.headers["content-type"] == "application/json"
        body = json.loads(reply.content)
        assert [item["id"] for item in body["data"]] == newest[:limit]
        assert (body["object"], body["has_more"]) == ("list", limit < 250)
        assert (body["first_id"], body["last_id"]) == (newest[0], newest[:limit][-1])
    oldest = customer.http.get("/files", params={"limit": 150, "order": "asc", "after": ids[49]}).json()
    assert [item["id"] for item in oldest["data"]] == ids[50:200]
    assert [file.id for file in customer.sdk.files.list(limit=120)] == newest
    assert [file.id for file in customer.sdk.files.list()] == newest
