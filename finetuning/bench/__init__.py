"""Experiments and speed runs; not imported by the product."""
