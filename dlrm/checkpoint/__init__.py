"""Checkpoints: files in the reference script's format for one rank, folders for several ranks."""
