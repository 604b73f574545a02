"""What a step computes. `ops.py` says what each op means; the modules beside it are made of those ops."""
