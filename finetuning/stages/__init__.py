"""The stages of a job in order; `pipeline.run` is the way in."""
