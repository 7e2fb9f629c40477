"""Files as the API shows them, and how long a client may keep one."""

from typing import cast

from app.core.storage.tables import File

LISTED_ERRORS = 3
_FINDINGS = ("errors", "warnings")
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3_600, 2_592_000


def file_to_body(file: File) -> dict[str, object]:
    """The file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "sha256": file.sha256,
        "validation": file.validation,
    }


def file_to_item(file: File) -> dict[str, object]:
    """The file object in a list: counts and the first errors of its check; the file by itself shows more."""
    body = file_to_body(file)
    if file.validation is not None:
        first = {name: cast(list[object], file.validation.get(name, []))[:LISTED_ERRORS] for name in _FINDINGS}
        total = cast(int, file.validation.get("errors_total", 0))
        body["validation"] = {**file.validation, **first, "truncated": total > len(first["errors"])}
    return body


def strong_etag(sha256: str) -> str:
    """The entity tag of bytes with this digest."""
    return f'"sha256-{sha256}"'


def deletion_to_body(kind: str, item_id: str) -> dict[str, object]:
    """The answer to a deletion. There are no receipts yet."""
    return {"id": item_id, "object": kind, "deleted": True, "receipt": None}
