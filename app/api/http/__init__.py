"""What every route shares: authentication, errors, uploads, downloads, paging, idempotency."""
