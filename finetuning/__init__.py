"""The library: fine-tuning that keeps a model's safety, usable from a notebook. No web, database or broker."""
