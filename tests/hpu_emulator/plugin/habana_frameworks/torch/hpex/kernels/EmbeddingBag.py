from habana_frameworks.torch._hpex_C import embedding_bag_sum_bwd as backward  # noqa: F401
from habana_frameworks.torch._hpex_C import embedding_bag_sum_fwd as forward  # noqa: F401
