from habana_frameworks.torch._hpex_C import embedding_bag_preproc as forward  # noqa: F401
