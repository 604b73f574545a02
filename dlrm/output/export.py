"""Files that show the model: an ONNX export, and a drawing of the compute graph.

Both are made from a `plain_copy` of the model, which runs the model's own forward pass on parts that use only operators
of torch that exporters know.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dlrm.errors import RunError
from dlrm.kernels.cross import CrossLayer, CrossNet
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.embedding import EmbeddingTable
from dlrm.kernels.special_tables import OrdinaryTable
from dlrm.options import Options
from dlrm.output.plots import require
from dlrm.system.files import check_writable, written_whole

ONNX_NAME, GRAPH_NAME = "dlrm_s_pytorch.onnx", "dlrm_s_pytorch_graph.dot"
MAX_EMBEDDED_BYTES = 2**31 - 2**20  # weights that fit into the ONNX file itself; protobuf's limit is 2 GiB


def check_exports(options: Options) -> None:
    """Raises UsageError, before training, if an export that the flags ask for could not be written after it."""
    if options.save_onnx:
        require("--save-onnx", "onnx", "onnxscript")
        check_writable("--save-onnx", Path(options.output_folder, ONNX_NAME))
    if options.plot_compute_graph:
        check_writable("--plot-compute-graph", Path(options.output_folder, GRAPH_NAME))


# ---------------------------------------------------------------------------------------------------------------------
# The model in plain torch
# ---------------------------------------------------------------------------------------------------------------------


class PlainBag(nn.Module):
    """Sums the rows that are looked up in one table, bag by bag.

    `row_weights` (rows,) are the weights of rows in weighted pooling, or None.
    """

    def __init__(self, table: nn.Module, row_weights: Tensor | None):
        super().__init__()
        self.table = table
        self.register_buffer("row_weights", None if row_weights is None else row_weights.detach())

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """Returns the pooled outputs (B, D) float32 of the bags that `indices` (lookups,) int64 consist of.

        `offsets` (B,) int64 say where in `indices` each bag begins.
        """
        bags_that_begin = torch.zeros(indices.shape[0] + 1, dtype=torch.int64)  # at each lookup, and after the last
        bags_that_begin = bags_that_begin.scatter_add(0, offsets, torch.ones_like(offsets))
        bag_of_lookup = bags_that_begin.cumsum(0)[:-1] - 1

        def sum_bags(weight: Tensor, rows: Tensor) -> Tensor:
            looked_up = weight[rows].float()
            if self.row_weights is not None:
                looked_up = looked_up * self.row_weights[indices][:, None]
            return torch.zeros(offsets.shape[0], weight.shape[1]).index_add(0, bag_of_lookup, looked_up)

        return self.table(indices, sum_bags)


class PlainLayer(nn.Module):
    """Computes x W^T + bias, or x W^T without a bias, followed by a ReLU if `relu`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        output = functional.linear(x, self.weight, self.bias)
        return functional.relu(output) if self.relu else output


class PlainBags(nn.ModuleList):
    """The embedding bags of all tables, in the place of a model's `emb_l`. Lookups are a pair: offsets and indices."""

    def forward(self, lookups: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
        """Offsets (T, B) and one tensor of indices (lookups,) per table -> one pooled output (B, D) per table."""
        offsets, indices = lookups
        return [bag(indices[table], offsets[table]) for table, bag in enumerate(self)]

    def pool(self, rows: list[Tensor], lookups: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
        """Returns the pooled outputs. Here `forward` has already summed the rows."""
        return rows


def plain_mlp(mlp: nn.Module) -> nn.Sequential:
    """Returns the layers of `mlp` as plain ones, under the names that they have in `mlp` and in checkpoints."""
    layers = OrderedDict()
    for name, layer in mlp.named_children():
        layers[name] = plain_layer(layer)
    return nn.Sequential(layers)


def plain_layer(layer: DenseLayer) -> PlainLayer:
    return PlainLayer(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), layer.relu)


def plain_cross_net(net: CrossNet) -> CrossNet:
    """Returns the cross layers of `net` out of plain layers."""
    return CrossNet(
        CrossLayer(None if cross.down is None else plain_layer(cross.down), plain_layer(cross.up)) for cross in net
    )


class PlainInteraction(nn.Module):
    """Concatenates all features or, if `dot`, the dense feature and the dot products of all pairs of features.

    `itself` adds the dot product of each feature with itself.
    """

    def __init__(self, dot: bool, num_features: int, itself: bool):
        super().__init__()
        self.dot, self.num_features = dot, num_features
        row, column = torch.tril_indices(num_features, num_features, offset=0 if itself else -1)
        self.register_buffer("pairs", row * num_features + column)

    def forward(self, dense: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Dense feature (B, D), one pooled output (B, D) per table -> (B, width)."""
        if not self.dot:
            return torch.cat([dense, *pooled], dim=1)
        features = torch.stack([dense, *pooled], dim=1)  # (B, F, D)
        products = torch.bmm(features, features.transpose(1, 2)).flatten(1)  # (B, F * F)
        return torch.cat([dense, products.index_select(1, self.pairs)], dim=1)


def plain_copy(model: nn.Module, options: Options) -> nn.Module:
    """Returns a `DLRM_Net` of plain parts, which computes in float32 on the CPU by the forward pass of `model`.

    It shares weights that are on the CPU with `model`, and has copies of all others.
    """

    class PlainDLRM(type(model)):
        def __init__(self):
            nn.Module.__init__(self)  # `DLRM_Net` itself would draw weights
            row_weights = getattr(model.emb_l, "row_weights", None) or [None] * len(model.emb_l)
            tables = [
                OrdinaryTable(table.weight.detach()) if isinstance(table, EmbeddingTable) else table
                for table in model.emb_l
            ]
            self.emb_l = PlainBags(map(PlainBag, tables, row_weights))
            self.bot_l, self.top_l = plain_mlp(model.bot_l), plain_mlp(model.top_l)
            self.cross_l = plain_cross_net(model.cross_l)
            dot, itself = options.arch_interaction_op == "dot", options.arch_interaction_itself
            self.interaction = PlainInteraction(dot, 1 + len(self.emb_l), itself)
            self.exchange, self.loss_threshold = model.exchange, model.loss_threshold
            self.to("cpu")

        def forward(self, dense_x: Tensor, offsets: Tensor, indices: Sequence[Tensor]) -> Tensor:
            """Returns click probabilities (B, 1) for dense features (B, dense features) and the bags of T tables.

            `indices` is one (lookups,) per table. `offsets` (T, B) say where in the indices of its table each bag
            begins. The names are those of the inputs in the exported files.
            """
            return super().forward(dense_x, (offsets, indices))

    return PlainDLRM()


def example_inputs(options: Options) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns inputs of a plain copy for two samples.

    No two tables share a tensor or a number of lookups: an exporter would conclude that they always do.
    """
    num_tables = len(options.arch_embedding_size)
    dense = torch.zeros(2, options.arch_mlp_bot[0])
    indices = [torch.zeros(3 + table, dtype=torch.int64) for table in range(num_tables)]
    return dense, torch.tensor([[0, 2]] * num_tables), indices


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------


def save_onnx(model: nn.Module, options: Options) -> Path:
    """Exports the model to ONNX and returns the path of the file. Raises RunError if it cannot be written.

    The inputs are `dense_x`, `offsets` and `indices_0`, `indices_1`, ..., as in the reference script. The output is
    `pred`. The number of samples is free, and so is the number of lookups in each table. Weights of about 2 GiB or more
    are in a second file, `dlrm_s_pytorch.onnx.data`, in the same folder.
    """
    plain, path = plain_copy(model, options).eval(), Path(options.output_folder, ONNX_NAME)
    tables = range(len(plain.emb_l))
    batch_size = torch.export.Dim("batch_size", min=1)
    lookups = [torch.export.Dim(f"lookups_{table}", min=0) for table in tables]
    with silent_exporter(), torch.no_grad():
        program = torch.onnx.export(
            plain,
            example_inputs(options),
            input_names=["dense_x", "offsets", *(f"indices_{table}" for table in tables)],
            output_names=["pred"],
            dynamic_shapes=({0: batch_size}, {1: batch_size}, [{0: count} for count in lookups]),
            dynamo=True,
            verbose=False,
        )
    bytes_as_float32 = 4 * sum(weight.numel() for weight in plain.state_dict().values())
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx.") as folder:
            program.save(Path(folder, path.name), external_data=bytes_as_float32 > MAX_EMBEDDED_BYTES)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # weights first: the model needs them
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise RunError(f"--save-onnx: cannot write {str(path)!r}: {error.strerror or error}") from None
    return path


@contextlib.contextmanager
def silent_exporter() -> Iterator[None]:
    """Suppresses the exporter's warnings and remarks about its own workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# The compute graph
# ---------------------------------------------------------------------------------------------------------------------

FILL_COLORS = {
    PlainBag: "lightblue",
    PlainLayer: "lightyellow",
    PlainInteraction: "lightgreen",
    CrossLayer: "lightgreen",
}


class _Tracer(fx.Tracer):
    """Traces tables, layers and the interaction as one node each."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in FILL_COLORS


def plot_compute_graph(model: nn.Module, options: Options) -> list[Path]:
    """Writes the compute graph as DOT text and, if Graphviz is installed, as SVG. Returns the paths of these files.

    Raises RunError if a file cannot be written, or if Graphviz fails.
    """
    path, flag = Path(options.output_folder, GRAPH_NAME), "--plot-compute-graph"
    with written_whole(flag, path) as temporary:
        temporary.write_text(compute_graph(model, options))
    if not shutil.which("dot"):
        return [path]
    drawing = path.with_suffix(".svg")
    with written_whole(flag, drawing) as temporary:
        command = ["dot", "-Tsvg", f"-o{temporary}", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise RunError(f"{flag}: Graphviz could not draw {str(path)!r}: {error.stderr.strip()}") from None
    return [path, drawing]


def compute_graph(model: nn.Module, options: Options) -> str:
    """Returns DOT text with a box for each input and operation of the model.

    The boxes of tables, layers and the interaction show the shapes of their weights and outputs.
    """
    from torch.fx.passes.shape_prop import ShapeProp  # a slow import that only this function needs

    plain = plain_copy(model, options)
    module = fx.GraphModule(plain, without_conversions(_Tracer().trace(plain)))
    with torch.no_grad():
        ShapeProp(module).propagate(*example_inputs(options))
    lines = ["digraph DLRM {", '  rankdir="BT";', '  node [shape="box", style="filled", fillcolor="white"];']
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name == "indices":
            continue  # the list of all tables' indices; its members are drawn
        color = FILL_COLORS[type(plain.get_submodule(node.target))] if node.op == "call_module" else "white"
        lines.append(f'  "{node.name}" [label="{_label(node, plain)}", fillcolor="{color}"];')
        lines += [f'  "{source.name}" -> "{node.name}";' for source in node.all_input_nodes if source.name != "indices"]
    return "\n".join([*lines, "}", ""])


def without_conversions(graph: fx.Graph) -> fx.Graph:
    """Returns the graph without the conversions to float32, which a plain copy has throughout."""
    for node in graph.find_nodes(op="call_method", target="float"):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return graph


def _label(node: fx.Node, plain: nn.Module) -> str:
    """Returns the name of the node, the shapes of its weights and the shape of its output, one per line."""
    lines = [str(node.target) if isinstance(node.target, str) else node.name]
    if node.op == "call_function" and len(node.args) == 2 and getattr(node.args[0], "op", "") == "placeholder":
        lines = [f"{node.args[0].name}_{node.args[1]}"]  # one table's member of the input `indices` or `offsets`
    if node.op == "call_module":
        parameters = plain.get_submodule(node.target).named_parameters()
        lines += [f"{name.split('.')[-1]} {_shape_text(weight.shape)}" for name, weight in parameters]
        lines.append(f"B x {_shape_text(node.meta['tensor_meta'].shape[1:])}")
    return "\\n".join(lines)


def _shape_text(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
