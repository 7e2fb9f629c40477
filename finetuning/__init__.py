"""The library: fine-tuning whose harm is measured before release, also from a notebook. No web, database or broker."""
