"""Bases that the product can fetch or make by itself."""
