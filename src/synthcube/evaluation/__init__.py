"""Judging images that were made: how near they are to real ones, and what they give away."""
