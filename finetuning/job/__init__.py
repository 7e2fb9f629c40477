"""One job, opened: its context, what is checked first, and who reads and measures its model."""
