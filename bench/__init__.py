"""Measurements of speed and memory with their bounds: `python -m bench`, or `make bench`."""
