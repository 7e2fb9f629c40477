"""What API, worker and library say to each other: order, recipe, progress, report. No torch."""
