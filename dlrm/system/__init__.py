"""The host: files, memory, signals."""
