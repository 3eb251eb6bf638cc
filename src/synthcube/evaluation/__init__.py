"""Evaluation of generated images: how near they are to real ones, and what they reveal."""
