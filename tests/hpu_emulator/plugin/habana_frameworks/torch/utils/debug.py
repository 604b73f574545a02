"""Switches of passes over lazy graphs. `passes` remembers how they were set."""

passes = {}


def _switch(name):
    def enable(flag):
        passes[name] = bool(flag)

    return enable


_enable_fuse_t_mm_optimization = _switch("fuse_t_mm_optimization")
_enable_eliminate_common_subexpression = _switch("eliminate_common_subexpression")
_enable_eliminate_dead_code = _switch("eliminate_dead_code")
_enable_constant_pooling = _switch("constant_pooling")
_enable_peephole_optimization = _switch("peephole_optimization")
_enable_fuse_bn_relu_optimization = _switch("fuse_bn_relu_optimization")
_enable_fuse_conv_bn_optimization = _switch("fuse_conv_bn_optimization")
_enable_permute_pass = _switch("permute_pass")
_enable_replace_inplace_ops = _switch("replace_inplace_ops")
_enable_replace_views = _switch("replace_views")
