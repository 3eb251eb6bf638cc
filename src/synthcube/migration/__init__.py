"""From a project of GaNDLF-Synth to a config and a manifest of ours.

keys.py says of every key what becomes of it; project.py holds what is read and written; the others
translate their part.
"""
