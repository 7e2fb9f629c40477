"""Where records lie: database, tables, legal job states, blobs."""
