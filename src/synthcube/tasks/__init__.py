"""The tasks: plain functions from folders to folders, one for each command."""
