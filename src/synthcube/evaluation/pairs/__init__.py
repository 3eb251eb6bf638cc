"""Predictions beside the very image that each should be."""
