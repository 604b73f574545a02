from habana_frameworks.torch._hpex_C import sparse_adagrad_with_valid_count as forward  # noqa: F401
