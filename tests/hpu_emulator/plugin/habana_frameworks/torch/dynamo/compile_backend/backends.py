"""The backend of torch.compile that is named hpu_backend. It traces by AOTAutograd, and runs operator by operator."""

import torch
from functorch.compile import make_boxed_func
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd

from . import config

aten = torch.ops.aten
DECOMPOSITIONS = [
    aten.addcdiv, aten.addcdiv_, aten.addcmul, aten.addcmul_, aten.arange, aten.baddbmm,
    aten.binary_cross_entropy_with_logits, aten.index_add, aten.index_add_,
]  # fmt: skip


def compile_graph(graph_module, example_inputs):
    """Counts a compilation and returns the graph as it is. Raises RuntimeError if it contains a collective."""
    for node in graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and "c10d" in node.target.namespace:
            raise RuntimeError(f"hpu_backend: {node.target} in a graph; collectives stay outside of what is compiled")
    torch.ops.hpu_emulator.compiled()
    torch.ops.hpu_emulator.mark("compile")
    return make_boxed_func(graph_module.forward)


def hpu_backend(graph_module, example_inputs, options=None):
    """Compiles a graph and its backward pass. Raises ValueError for options that the plugin does not have."""
    for name in options or {}:
        if not hasattr(config, name):
            raise ValueError(f"hpu_backend has no option {name}")
    compiler = aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        decompositions=get_decompositions(DECOMPOSITIONS),
        keep_inference_input_mutations=config.keep_input_mutations,
    )
    return compiler(graph_module, example_inputs)
