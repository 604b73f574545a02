"""Attacks on the trainer that take minutes to hours, and are run by hand: see docs/stress.md."""
