"""The model as a file: ONNX, and a drawing of its compute graph.

Both are made of `PlainDLRM`, the same weights in torch's own operators, which every exporter knows.
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
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dlrm.errors import RunError
from dlrm.kernels.embedding import EmbeddingTable
from dlrm.kernels.special_tables import OrdinaryTable
from dlrm.options import Options
from dlrm.output.plots import require
from dlrm.system.files import check_writable, written_whole

ONNX_NAME, GRAPH_NAME = "dlrm_s_pytorch.onnx", "dlrm_s_pytorch_graph.dot"
EMBEDDED_BYTES = 2**31 - 2**20  # of weights that fit in an ONNX file; protobuf ends at 2 GiB


def check_exports(options: Options) -> None:
    """UsageError, before training, if what the flags ask for could not be written."""
    if options.save_onnx:
        require("--save-onnx", "onnx", "onnxscript")
        check_writable("--save-onnx", Path(options.output_folder, ONNX_NAME))
    if options.plot_compute_graph:
        check_writable("--plot-compute-graph", Path(options.output_folder, GRAPH_NAME))


# ---------------------------------------------------------------------------------------------------------------------
# The model in plain torch
# ---------------------------------------------------------------------------------------------------------------------


class PlainBag(nn.Module):
    """Lookups in one table, summed bag by bag."""

    def __init__(self, table: nn.Module, row_weights: Tensor | None):
        super().__init__()
        self.table = table
        self.register_buffer("row_weights", None if row_weights is None else row_weights.detach())

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """(lookups,), (B,) where each bag starts -> (B, D)."""
        starts_here = torch.zeros(indices.shape[0] + 1, dtype=torch.int64)
        starts_here = starts_here.scatter_add(0, offsets, torch.ones_like(offsets))
        bags = starts_here.cumsum(0)[:-1] - 1  # (lookups,)

        def sum_bags(weight: Tensor, rows: Tensor) -> Tensor:
            looked_up = weight[rows].float()
            if self.row_weights is not None:
                looked_up = looked_up * self.row_weights[indices][:, None]
            return torch.zeros(offsets.shape[0], weight.shape[1]).index_add(0, bags, looked_up)

        return self.table(indices, sum_bags)


class PlainLayer(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, relu: bool):
        super().__init__()
        self.weight, self.bias, self.relu = nn.Parameter(weight), nn.Parameter(bias), relu

    def forward(self, x: Tensor) -> Tensor:
        output = functional.linear(x, self.weight, self.bias)
        return functional.relu(output) if self.relu else output


def plain_mlp(mlp: nn.Module) -> nn.Sequential:
    """With the names that layers have in `mlp`, and in checkpoints."""
    plain = OrderedDict()
    for name, layer in mlp.named_children():
        plain[name] = PlainLayer(layer.weight.detach(), layer.bias.detach(), layer.relu)
    return nn.Sequential(plain)


class PlainInteraction(nn.Module):
    def __init__(self, dot: bool, num_features: int, itself: bool):
        super().__init__()
        self.dot, self.num_features = dot, num_features
        row, column = torch.tril_indices(num_features, num_features, offset=0 if itself else -1)
        self.register_buffer("pairs", row * num_features + column)

    def forward(self, dense: Tensor, *pooled: Tensor) -> Tensor:
        """(B, D), T of (B, D) -> (B, width)."""
        if not self.dot:
            return torch.cat([dense, *pooled], dim=1)
        features = torch.stack([dense, *pooled], dim=1)  # (B, F, D)
        products = torch.bmm(features, features.transpose(1, 2)).flatten(1)  # (B, F * F)
        return torch.cat([dense, products.index_select(1, self.pairs)], dim=1)


class PlainDLRM(nn.Module):
    """A `DLRM_Net` on the CPU in float32. Shares the weights of tables that are there."""

    def __init__(self, model: nn.Module, options: Options):
        super().__init__()
        row_weights = getattr(model.emb_l, "row_weights", None) or [None] * len(model.emb_l)
        tables = [OrdinaryTable(t.weight.detach()) if isinstance(t, EmbeddingTable) else t for t in model.emb_l]
        self.emb_l = nn.ModuleList(map(PlainBag, tables, row_weights))
        self.bot_l, self.top_l = plain_mlp(model.bot_l), plain_mlp(model.top_l)
        dot, itself = options.arch_interaction_op == "dot", options.arch_interaction_itself
        self.interaction = PlainInteraction(dot, 1 + len(self.emb_l), itself)
        self.loss_threshold = options.loss_threshold
        self.to("cpu")

    def forward(self, dense_x: Tensor, offsets: Tensor, indices: Sequence[Tensor]) -> Tensor:
        """(B, dense features), (T, B), T of (lookups,) -> (B, 1) click probabilities."""
        pooled = [table(indices[t], offsets[t]) for t, table in enumerate(self.emb_l)]
        probability = torch.sigmoid(self.top_l(self.interaction(self.bot_l(dense_x), *pooled)))
        if self.loss_threshold > 0:
            probability = probability.clamp(self.loss_threshold, 1 - self.loss_threshold)
        return probability

    def example(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Inputs of two samples. No two tables share a tensor or a size, which an exporter would take for a rule."""
        tables = len(self.emb_l)
        dense = torch.zeros(2, self.bot_l[0].weight.shape[1])
        return dense, torch.tensor([[0, 2]] * tables), [torch.zeros(3 + t, dtype=torch.int64) for t in range(tables)]


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------


def save_onnx(model: nn.Module, options: Options) -> Path:
    """Inputs `dense_x`, `offsets` and `indices_0`, `indices_1`, ..., as the public script names them; output `pred`.
    Number of samples and lookups are free. Weights of 2 GiB or more lie beside it, in `dlrm_s_pytorch.onnx.data`."""
    plain, path = PlainDLRM(model, options).eval(), Path(options.output_folder, ONNX_NAME)
    tables = range(len(plain.emb_l))
    batch = torch.export.Dim("batch_size", min=1)
    shapes = ({0: batch}, {1: batch}, [{0: torch.export.Dim(f"lookups_{t}", min=0)} for t in tables])
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            plain,
            plain.example(),
            input_names=["dense_x", "offsets", *(f"indices_{t}" for t in tables)],
            output_names=["pred"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    numbers = sum(weight.numel() for weight in plain.state_dict().values())
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx.") as folder:
            program.save(Path(folder, path.name), external_data=4 * numbers > EMBEDDED_BYTES)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise RunError(f"--save-onnx: cannot write {str(path)!r}: {error.strerror or error}") from None
    return path


@contextlib.contextmanager
def quiet():
    """Without the exporter's remarks on its own workings."""
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

FILLS = {PlainBag: "lightblue", PlainLayer: "lightyellow", PlainInteraction: "lightgreen"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in FILLS


def plot_compute_graph(model: nn.Module, options: Options) -> list[Path]:
    """Writes the graph as DOT text and, if Graphviz is installed, as SVG."""
    path, flag = Path(options.output_folder, GRAPH_NAME), "--plot-compute-graph"
    with written_whole(flag, path) as temporary:
        temporary.write_text(compute_graph(PlainDLRM(model, options)))
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


def compute_graph(plain: PlainDLRM) -> str:
    """DOT text: tables, layers and interaction as boxes, with the shapes of weights and outputs."""
    from torch.fx.passes.shape_prop import ShapeProp  # its import takes as long as all of torch.fx

    module = fx.GraphModule(plain, _Tracer().trace(plain))
    with torch.no_grad():
        ShapeProp(module).propagate(*plain.example())
    lines = ["digraph DLRM {", '  rankdir="BT";', '  node [shape="box", style="filled", fillcolor="white"];']
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name == "indices":
            continue  # its parts are drawn
        fill = FILLS[type(plain.get_submodule(node.target))] if node.op == "call_module" else "white"
        lines.append(f'  "{node.name}" [label="{_label(node, plain)}", fillcolor="{fill}"];')
        lines += [f'  "{source.name}" -> "{node.name}";' for source in node.all_input_nodes if source.name != "indices"]
    return "\n".join([*lines, "}", ""])


def _label(node: fx.Node, plain: PlainDLRM) -> str:
    """Name, shapes of weights, shape of the output."""
    parts = [str(node.target) if isinstance(node.target, str) else node.name]
    if node.op == "call_function" and len(node.args) == 2 and getattr(node.args[0], "op", "") == "placeholder":
        parts = [f"{node.args[0].name}_{node.args[1]}"]  # the part of an input that a table takes
    if node.op == "call_module":
        named = plain.get_submodule(node.target).named_parameters()
        parts += [f"{name.split('.')[-1]} {_times(weight.shape)}" for name, weight in named]
        parts.append(f"B x {_times(node.meta['tensor_meta'].shape[1:])}")
    return "\\n".join(parts)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
