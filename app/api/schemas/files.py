"""Files on the wire.

Knows field names and which purposes a client may upload; must not know queries or bytes.
"""

from app.core.storage.tables import File

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3_600, 2_592_000


def file_to_wire(file: File) -> dict[str, object]:
    """The file object of api.md 3.1."""
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


def deleted_to_wire(kind: str, item_id: str) -> dict[str, object]:
    """The answer to a deletion; receipts belong to a later issue."""
    return {"id": item_id, "object": kind, "deleted": True, "receipt": None}
