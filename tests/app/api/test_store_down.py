"""What clients are told while the blob store does not answer."""

import pytest

from tests.support.backends import BACKEND
from tests.support.http import Customer, chat_rows


def test_a_store_that_is_down_is_503_and_keeps_nothing(customer: Customer) -> None:
    """S27: uploads and downloads say that the storage does not answer and when to come again; nothing is half there."""
    if BACKEND.is_production:
        pytest.skip("moves the folder away that is the store; tests/faults has the object store's")
    kept = customer.file_id()
    before = customer.http.get("/files").json()["data"]
    root = customer.served.settings.data / "blobs"
    away = root.with_name("blobs-away")
    root.rename(away)
    root.write_text("no folder")
    try:
        for reply in (customer.upload(chat_rows(12)), customer.http.get(f"/files/{kept}/content")):
            assert reply.status_code == 503
            error = reply.json()["error"]
            assert (error["code"], error["type"], error["param"]) == ("storage_unavailable", "server_error", None)
            assert int(reply.headers["Retry-After"]) >= 1
    finally:
        root.unlink()
        away.rename(root)
    assert customer.http.get("/files").json()["data"] == before
    assert customer.http.get(f"/files/{kept}/content").status_code == 200
