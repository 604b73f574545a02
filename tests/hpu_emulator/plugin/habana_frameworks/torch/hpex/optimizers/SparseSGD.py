from habana_frameworks.torch._hpex_C import sparse_sgd_with_valid_count as forward  # noqa: F401
