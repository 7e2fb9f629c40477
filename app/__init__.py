"""The API and the records behind it; never imports torch."""
