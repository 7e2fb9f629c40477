"""The embedded model server: a small engine that decodes mixed adapters in one batch."""
