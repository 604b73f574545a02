"""A test double of an Intel Gaudi: README.md says what it does and what it does not."""
