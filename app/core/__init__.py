"""Records: what the service remembers, and the moves between its states. No web, no torch."""
