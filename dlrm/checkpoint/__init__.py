"""Checkpoints, in the public script's format and, for several ranks, in a folder of their own."""
