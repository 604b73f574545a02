use_eager_fallback = True
keep_input_mutations = True
use_inplace_index_copy = True
force_static_compile = False
inference = None
