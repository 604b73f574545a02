"""Where batches come from. `data_set.py` says what a source of batches offers."""
