"""One router for each resource: short handlers that call app.core and answer with a schema."""
