"""Glue to training frameworks; importing a file here imports its framework."""
