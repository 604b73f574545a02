"""Train the Deep Learning Recommendation Model (Naumov et al., arXiv:1906.00091) on a Gaudi, a CPU or a GPU.

    python dlrm_s_pytorch.py --num-batches=100 --mini-batch-size=128 --print-time     on a Gaudi, else on the CPU
    python dlrm_s_pytorch.py --device=cuda ...                                         on a CUDA GPU
    python dlrm_s_pytorch.py --help                                                    every flag

From top to bottom: the model, loss and metrics, where a run stands, training, evaluation, and a whole run. The script
puts together the parts that are in the package `dlrm/`, whose docstring is a map, and the Gaudi's, which are in
`dlrm_habana_kernels.py`. `demo_dlrm.py` runs it with the flags of a file in `hb_configs/`; all flags are declared in
`dlrm/options.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from dlrm.distributed.launch import prepare_program
from dlrm.errors import RunError, UsageError
from dlrm.options import OptionParser, Options, flags_without_effect, to_argv

if __name__ == "__main__":
    prepare_program(sys.argv[1:])  # a Gaudi plugin may come in with torch, and then reads it

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlrm.batch import Batch
from dlrm.checkpoint import checkpoint
from dlrm.checkpoint.checkpoint import ModelTensors
from dlrm.checkpoint.location import reserved
from dlrm.data.data_set import Data, DataSet, open_data_set
from dlrm.devices.backend import Backend
from dlrm.devices.cpu import CpuBackend
from dlrm.devices.cuda import CudaBackend
from dlrm.distributed.launch import Launch, find_launch
from dlrm.distributed.placement import Piece, bytes_per_weight, make_plan
from dlrm.distributed.ranks import OneRank, Ranks, expected_memory_per_rank
from dlrm.distributed.rendezvous import check_launch, join_ranks, leave, rank_0_speaks
from dlrm.evaluation import Best, Scores, test_line
from dlrm.kernels.cross import CrossLayer, CrossNet
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.lookups import Lookups
from dlrm.kernels.special_tables import SpecialTables, table_numbers
from dlrm.output.export import check_exports, plot_compute_graph, save_onnx
from dlrm.output.mlperf import MlperfLog
from dlrm.output.observer import Observer
from dlrm.output.plots import observers
from dlrm.output.profile import NoProfiler, Profiler
from dlrm.output.report import RunReport, StepClock, batch_size, make_report
from dlrm.pipeline import BatchPipeline, PreparedBatch
from dlrm.system.endings import end_by
from dlrm.system.files import check_writable
from dlrm.system.signals import Stopped, StopSignals
from dlrm_habana_kernels import HpuBackend, why_no_gaudi

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Fully connected layers, each with its ReLU."""

    def __init__(self, layers: Iterable[DenseLayer]):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(2 * number), layer)  # in checkpoints, each ReLU has always had a number of its own

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs of the first layer) -> (B, outputs of the last layer)."""
        for layer in self.children():
            x = layer(x)
        return x


class DLRM_Net(nn.Module):  # the name that every DLRM script uses
    """Dense features through the bottom MLP, lookups through embedding bags, their interaction through the top MLP.

    Several ranks share one model: each has pieces of the tables, and copies of the MLPs for its own samples. b is the
    number of a rank's samples, B that of all ranks; on one rank they are equal.
    """

    def __init__(
        self,
        options: Options,
        backend: Backend,
        ranks: Ranks | None = None,
        generator: np.random.RandomState | None = None,
    ):
        """Draws the weights in the order of the reference script (tables, bottom MLP, top MLP), so that equal seeds
        train alike, from `generator` or one that starts at the seed. Keeps the pieces of tables of this rank."""
        super().__init__()
        ranks = ranks or OneRank(options)
        generator = generator or np.random.RandomState(options.numpy_rand_seed)
        interaction = backend.interactions[options.arch_interaction_op]
        num_features = 1 + len(options.arch_embedding_size)
        self.interaction = interaction(num_features, options.embedding_dim, options.arch_interaction_itself)
        self.exchange = ranks.exchange(backend.device)
        if options.special_tables:
            self.emb_l = SpecialTables(options, partial(draw_whole_table, generator))
        else:
            row_type = torch.bfloat16 if options.table_data_type == "bf16" else torch.float32
            tables = draw_tables(generator, options, ranks.held_pieces)
            origins = [(piece.table, piece.first_row) for piece in ranks.held_pieces]
            self.emb_l = backend.embedding_bags((table.to(row_type) for table in tables), origins)
        self.v_W_l = nn.ParameterList(self.emb_l.learned_row_weights)
        self.bot_l = draw_mlp(generator, options.arch_mlp_bot, backend, ends_in_relu=True)
        self.cross_l = CrossNet()
        if options.arch_interaction_op == "dcn":
            width, rank = self.interaction.width, options.dcn_low_rank_dim
            layers = (draw_cross(generator, width, rank, backend) for _ in range(options.dcn_num_layers))
            self.cross_l = backend.cross_net(layers)
        top_widths = (self.interaction.width, *options.arch_mlp_top)
        self.top_l = draw_mlp(generator, top_widths, backend, ends_in_relu=False)
        self.loss_threshold = options.loss_threshold
        self.compile_parts(backend, one_rank=ranks.size == 1)

    def forward(self, dense: Tensor, lookups: Lookups) -> Tensor:
        """Click probabilities of this rank's samples, (b, 1) float32, from their dense features (b, m) and from the
        lookups of all samples in this rank's pieces of tables."""
        return self.predict(dense, self.emb_l(lookups), lookups)

    def predict(self, dense: Tensor, rows: Tensor, lookups: Lookups) -> Tensor:
        """Click probabilities from the rows that were read from the tables."""
        sent = self.exchange.start(self.pool(rows, lookups))
        features = self.bottom(dense)  # runs while pooled rows travel to the ranks of their samples
        return self.top(features, self.exchange.finish(sent))

    def pool(self, rows: Tensor, lookups: Lookups) -> Tensor:
        """The sum over each bag, (B, pieces of this rank, columns of a piece)."""
        return self.emb_l.pool(rows, lookups)

    def bottom(self, dense: Tensor) -> Tensor:
        """(b, m) -> (b, D)"""
        return self.bot_l(dense)

    def top(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(b, D), (b, T, D) -> (b, 1) float32."""
        logit = self.top_l(self.cross_l(self.interaction(features, pooled)))
        probability = torch.sigmoid(logit.float())  # in bf16, probabilities above 0.996 would all be 1
        if self.loss_threshold > 0:
            probability = probability.clamp(self.loss_threshold, 1 - self.loss_threshold)
        return probability

    def compile_parts(self, backend: Backend, one_rank: bool) -> None:
        """Compiles, where `--mode` asks for it, all that follows the reading of tables; on several ranks in three
        parts, as collectives do not belong into compiled code."""
        for part in ("predict",) if one_rank else ("pool", "bottom", "top"):
            setattr(self, part, backend.compile(getattr(self, part)))

    def dense_layers(self) -> list[DenseLayer]:
        """All layers, in the order in which a forward pass runs them."""
        return [*self.bot_l.children(), *self.layers_after_exchange()]

    def layers_after_exchange(self) -> list[DenseLayer]:
        """The layers whose input depends on the tables: those of the cross layers, then those of the top MLP."""
        return [*self.cross_l.dense_layers(), *self.top_l.children()]


WEIGHTS_PER_BLOCK = 2**20  # drawn at a time, so that no large tensor is ever there in float64


def draw_tables(generator: np.random.RandomState, options: Options, held_pieces: Sequence[Piece]) -> Iterable[Tensor]:
    """Yields the pieces of tables that are held, in order. All tables are drawn, whoever holds them."""
    for table, rows in enumerate(options.arch_embedding_size):
        pieces = [piece for piece in held_pieces if piece.table == table]
        yield from draw_table(generator, rows, options.arch_sparse_feature_size, pieces)


def draw_whole_table(generator: np.random.RandomState, rows: int, dim: int) -> Tensor:
    """Returns a table (rows, dim)."""
    return draw_table(generator, rows, dim, [Piece(0, 0, rows, 0, dim)])[0]


def draw_table(generator: np.random.RandomState, rows: int, dim: int, pieces: Sequence[Piece]) -> list[Tensor]:
    """Returns pieces of a table (rows, dim), float32, uniform in +-sqrt(1 / rows)."""
    bound, rows_per_block = np.sqrt(1 / rows), max(1, WEIGHTS_PER_BLOCK // dim)
    parts = [torch.empty(piece.rows, piece.columns) for piece in pieces]
    for first in range(0, rows, rows_per_block):
        block = torch.from_numpy(generator.uniform(-bound, bound, (min(rows_per_block, rows - first), dim)))
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_rows(block, first, part)
    return parts


def draw_mlp(generator: np.random.RandomState, widths: Sequence[int], backend: Backend, ends_in_relu: bool) -> MLP:
    """Returns layers of the given widths, the first of which is the width of the input."""
    ends_of_layers = list(pairwise(widths))  # none, if the MLP has one width: then its output is its input
    last = len(ends_of_layers) - 1
    return MLP(
        backend.layer(*draw_layer(generator, n, m), relu=number < last or ends_in_relu)
        for number, (n, m) in enumerate(ends_of_layers)
    )


def draw_layer(generator: np.random.RandomState, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Returns a weight (outputs, inputs), normal with variance 2 / (inputs + outputs), and a bias (outputs,), normal
    with variance 1 / outputs."""
    weight_deviation, bias_deviation = np.sqrt(2 / (inputs + outputs)), np.sqrt(1 / outputs)
    weight = draw((outputs, inputs), lambda count: generator.normal(0, weight_deviation, count))
    return weight, draw((outputs,), lambda count: generator.normal(0, bias_deviation, count))


def draw_cross(generator: np.random.RandomState, width: int, rank: int, backend: Backend) -> CrossLayer:
    """Returns a cross layer of the given width, of full rank if `rank` is 0. Weights are normal with variance
    2 / (inputs + outputs), and biases are 0, as torchrec's cross layers begin."""
    inputs = rank or width
    deviation = np.sqrt(2 / (inputs + width))
    down = None
    if rank:
        weight = draw((rank, width), lambda count: generator.normal(0, deviation, count))
        down = backend.layer(weight, None, relu=False)
    weight = draw((width, inputs), lambda count: generator.normal(0, deviation, count))
    return CrossLayer(down, backend.layer(weight, torch.zeros(width), relu=False))


def draw(shape: Sequence[int], numbers: Callable[[int], np.ndarray]) -> Tensor:
    """Returns a float32 tensor of the float64 numbers that `numbers(count)` draws."""
    tensor = torch.empty(*shape)
    for block in tensor.view(-1).split(WEIGHTS_PER_BLOCK):
        block.copy_(torch.from_numpy(numbers(len(block))))
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# Loss and metrics
# ---------------------------------------------------------------------------------------------------------------------


class WeightedBCELoss(nn.Module):
    """Binary cross-entropy with a weight for each class; targets between 0 and 1 weigh as class 0."""

    def __init__(self, weights: tuple[float, float], dtype: torch.dtype):
        """`dtype`: the type in which losses are weighed and averaged."""
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=dtype))

    def forward(self, probability: Tensor, target: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy(probability, target, reduction="none")
        return (torch.where(target < 1, *self.weights) * losses).mean()


def make_loss(options: Options, backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the function (probability, target) -> mean loss over the batch, for (B, 1) float32 tensors. The loss of
    predictions that are NaN is NaN."""
    if options.loss_function == "mse":
        return functional.mse_loss
    loss = functional.binary_cross_entropy
    if options.loss_function == "wbce":
        loss = WeightedBCELoss(options.loss_weights, backend.wide_dtype).to(backend.device)
    return partial(nan_where_predictions_are, loss)


def nan_where_predictions_are(loss: Callable[[Tensor, Tensor], Tensor], probability: Tensor, target: Tensor) -> Tensor:
    """Calls torch's cross-entropy, which ends the program if a prediction is NaN, with a number in place of each NaN.
    What is added to its result is NaN if there was one, and 0 otherwise."""
    is_nan = probability.isnan()
    return loss(torch.where(is_nan, 0.5, probability), target) + torch.where(is_nan, torch.nan, 0.0).sum()


class LongSum:
    """A sum on the device that stays right over millions of terms.

    In float64 it is a plain sum. In float32, which is all that a Gaudi has, it carries what each addition rounds off
    (W. Kahan, "Further remarks on reducing truncation errors", CACM 1965).
    """

    def __init__(self, backend: Backend):
        self.total, self._rounded_off = torch.zeros(2, dtype=backend.wide_dtype, device=backend.device)

    def add(self, term: Tensor) -> None:
        """Adds a tensor of one element."""
        term = term.to(self.total.dtype)
        if self.total.dtype == torch.float64:
            self.total = self.total + term
            return
        term = term - self._rounded_off
        total = self.total + term
        self._rounded_off = (total - self.total) - term
        self.total = total

    def state(self) -> Tensor:
        """Returns the sum on the host, float64, which holds what was rounded off as well."""
        return self.total.double().cpu() - self._rounded_off.double().cpu()

    def load(self, state: Tensor) -> None:
        """Takes a sum that `state` returned, or any number."""
        state = state.reshape(())
        total = state.to(self.total.dtype)
        self._rounded_off = (total.double() - state.double()).to(self._rounded_off)
        self.total = total.clone().to(self.total.device)


class Metrics:
    """Loss and accuracy since the last printed line, kept on the device until they are read."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._start_anew()

    def _start_anew(self) -> None:
        self._loss, self._hits = LongSum(self._backend), LongSum(self._backend)
        self._finite = torch.zeros((), dtype=torch.int32, device=self._backend.device)
        self._samples = 0

    def add(self, loss: Tensor, probability: Tensor, target: Tensor) -> None:
        """Adds a batch. A hit is a prediction on its target's side of 0.5; where targets are 0 and 1, the share of hits
        is the accuracy."""
        self._loss.add(loss * len(target))
        self._hits.add(((probability > 0.5) == (target > 0.5)).sum(dtype=torch.int32))
        self._finite += self._loss.total.isfinite()  # a sum that is not finite stays so
        self._samples += len(target)

    def sum_over(self, ranks: Ranks) -> None:
        """Makes the counters those of all ranks."""
        self._loss.total, self._hits.total = ranks.sum_over_ranks(self._loss.total, self._hits.total)
        self._finite = ranks.min_over_ranks(self._finite)
        self._samples *= ranks.size

    def read(self) -> tuple[float, float, int]:
        """Returns the mean loss, the accuracy in percent, and the number of iterations before the first loss that was
        not finite. Waits for the device, and starts anew."""
        loss, accuracy = self._loss.total.item() / self._samples, 100 * self._hits.total.item() / self._samples
        finite = -1 if np.isfinite(loss) else self._finite.item()
        self._start_anew()
        return loss, accuracy, finite

    def state(self) -> dict:
        """Returns this rank's counters, for a checkpoint."""
        sums = {"loss": self._loss.state(), "hits": self._hits.state()}
        return sums | {"finite": self._finite.cpu(), "samples": self._samples}

    def load(self, states: Sequence[dict], ranks: Ranks) -> None:
        """Takes the counters from the `state` of each rank of the run that was saved."""
        state = states[ranks.rank] if len(states) == ranks.size else metrics_of_other_world_size(states, ranks)
        self._loss.load(state["loss"])
        self._hits.load(state["hits"])
        self._finite = state["finite"].reshape(()).clone().to(self._finite.device)
        self._samples = state["samples"]


def metrics_of_other_world_size(states: Sequence[dict], ranks: Ranks) -> dict:
    """Returns a `Metrics.state` from those of more or fewer ranks: rank 0 takes their sums, the other ranks nothing."""
    share = 0 if ranks.rank else 1
    return {
        "loss": share * sum(state["loss"] for state in states),
        "hits": share * sum(state["hits"] for state in states),
        "finite": min(state["finite"] for state in states),
        "samples": sum(state["samples"] for state in states) // ranks.size,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Where a run stands
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands, between two steps of the optimizers."""

    epoch: int = 0
    iteration: int = 0  # number of iterations of this epoch that are done
    step: int = 0  # number of optimizer steps, in all epochs
    printed: int = 0  # iteration of the last printed line
    train_loss: float = math.nan  # as printed last
    test_accuracy: float = 0.0
    test_auc: float = 0.0
    best: Best = field(default_factory=Best)

    def for_reference_script(self) -> dict[str, Any]:
        """Returns the keys under which the reference script looks for them in a checkpoint."""
        return {
            "epoch": self.epoch,
            "iter": self.iteration,
            "train_loss": self.train_loss,
            "total_loss": 0.0,
            "test_acc": self.test_accuracy,
            "test_auc": self.test_auc,
        }

    @classmethod
    def of_reference_script(cls, state: dict[str, Any], options: Options) -> Progress:
        """Returns where the reference script stood when it wrote a checkpoint. Raises UsageError if its epochs have
        another length than those of this run."""
        if state["nbatches"] != options.batches_per_epoch:
            raise UsageError(
                f"the checkpoint is of epochs of {state['nbatches']} batches, this run's have "
                f"{options.batches_per_epoch}"
            )
        accuracy, auc = float(state.get("test_acc", 0)), float(state.get("test_auc", 0))
        iterations = state["epoch"] * state["nbatches"] + state["iter"]
        return cls(
            epoch=state["epoch"],
            iteration=state["iter"],
            step=iterations // options.mlperf_grad_accum_iter,
            printed=state["iter"],
            train_loss=float(state.get("train_loss", math.nan)),
            test_accuracy=accuracy,
            test_auc=auc,
            best=Best(accuracy, auc),
        )


class LearningRateSchedule:
    """Linear warm-up, then constant, then quadratic decay, then constant at the decayed rate."""

    lowest = 1e-7

    def __init__(self, options: Options):
        self.base, self.warm_up = options.learning_rate, options.lr_num_warmup_steps
        self.decay_start, self.decay_steps = options.lr_decay_start_step, options.lr_num_decay_steps

    def rate(self, step: int) -> float:
        """Returns the learning rate of an optimizer step; the first step is number 1."""
        if step < self.warm_up:
            return self.base * step / self.warm_up
        if step < self.decay_start or not self.decay_steps:
            return self.base
        left = max(self.decay_steps - (step - self.decay_start), 1)
        return min(self.base, max(self.lowest, self.base * (left / self.decay_steps) ** 2))


class Reporter:
    """Prints lines for people and scripts, and tells the observer the same numbers."""

    def __init__(self, options: Options, observer: Observer):
        self.options, self.observer = options, observer

    def line(self, progress: Progress, iterations: int, milliseconds: float, loss: float, accuracy: float) -> None:
        """Prints the means of the iterations since the last line, in the format that scripts parse."""
        options = self.options
        line = (
            f"Finished {'inference' if options.inference_only else 'training'} it {progress.iteration}/{iterations} "
            f"of epoch {progress.epoch}, {milliseconds if options.print_time else -1:.2f} ms/it, "
            f"loss {loss:.6f}, accuracy {accuracy:3.3f} %"
        )
        tqdm.write(line + (time.strftime(" (%H:%M)") if options.print_wall_time else ""))
        if options.print_dist_loss:
            tqdm.write(f" Distributed Loss :: {loss:.6f}")
        phase = "Test" if options.inference_only else "Train"
        self.observe(phase, progress, iterations, Loss=loss, Accuracy=accuracy, ms_per_it=milliseconds)

    def memory(self, backend: Backend) -> None:
        """Prints the memory in use, if `--log-device-mem-alloc`."""
        if self.options.log_device_mem_alloc:
            now, peak = backend.memory_in_use()
            tqdm.write(f"Memory in use: {now / 2**30:.3f} GiB, at most {peak / 2**30:.3f} GiB")

    def scores(self, progress: Progress, iterations: int, scores: Scores) -> None:
        """Prints what a test has found, in the format that scripts parse."""
        self.observe("Test", progress, iterations, Acc=100 * scores.accuracy, AUC=scores.auc, Loss=scores.loss)
        all_metrics = self.options.mlperf_logging
        tqdm.write(test_line(progress.iteration, iterations, progress.epoch, scores, progress.best, all_metrics))

    def observe(self, phase: str, progress: Progress, iterations: int, **values: float) -> None:
        step = progress.epoch * iterations + progress.iteration
        self.observer.observe(step, {f"{phase}/{quantity}": value for quantity, value in values.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """A model, its data and its optimizers on a device, and the loop that trains the model."""

    def __init__(
        self, data_set: DataSet, backend: Backend, ranks: Ranks | None = None, observer: Observer | None = None
    ):
        options = data_set.options
        ranks = ranks or OneRank(options)
        self.options, self.backend, self.ranks = options, backend, ranks
        self.mlperf = MlperfLog(options, ranks.rank)
        self.mlperf.event(cache_clear=True)
        self.mlperf.start("init")
        self.data, self.test_data = map(ranks.share, (data_set.training_data(), data_set.test_data()))
        self.model = DLRM_Net(options, backend, ranks, data_set.weight_generator()).to(backend.device)
        self.loss = make_loss(options, backend)
        self.dense_gradients = ranks.dense_gradients(self.model)
        self.optimizers = []  # inference has none: moments take as much memory as weights
        if not options.inference_only:
            self.dense_optimizer = backend.dense_optimizer(self.model.dense_layers(), options)
            self.sparse_optimizer = backend.sparse_optimizer(self.model.emb_l, options)
            self.optimizers += [self.dense_optimizer, self.sparse_optimizer]
        self.tensors = ModelTensors(self.model, self.optimizers, ranks)
        self.repeated_update = backend.replace_step_by_recorded(self.update)
        self.schedule = LearningRateSchedule(options)
        self.metrics, self.progress = Metrics(backend), Progress()
        self.reporter = Reporter(options, observer or Observer())
        self.profiler = self.make_profiler() if options.enable_profiling and not ranks.rank else NoProfiler()
        self.clock, self.signals = StepClock(backend, self.profiler.lap), StopSignals(announces=self.ranks.rank == 0)
        self.model.emb_l.register_forward_hook(lambda *_: self.clock.lap("forward: lookup"))
        self.evaluator = Evaluator(self)
        self.pipeline = self.evaluator.pipeline if options.inference_only else self.make_pipeline()

    def make_pipeline(self) -> BatchPipeline:
        samples = self.options.samples_per_step
        return BatchPipeline(self.data, self.backend, samples, self.ranks.size, self.ranks.watch)

    def make_profiler(self) -> Profiler:
        if self.options.inference_only:
            iterations = len(self.test_data)
        else:
            iterations = len(self.data) // self.options.mlperf_grad_accum_iter
        return Profiler(self.options, self.backend, self.options.nepochs * iterations)

    # -- One step

    def prepared(self, batches: Iterable[Batch]) -> Iterator[PreparedBatch]:
        """Yields the batches as `train_step` takes them, with the learning rates of the next steps."""
        return self.pipeline.run(batches, map(self.schedule.rate, itertools.count(self.progress.step + 1)))

    def train_step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Forward, backward, update. Returns loss and click probabilities, which stay on the device."""
        for optimizer in self.optimizers:
            self.backend.set_learning_rate(optimizer, batch.exact_learning_rate, batch.learning_rate)
        loss, probability = self.repeated_update(batch)
        self.progress.step += 1
        return loss, probability

    def update(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """The part of a step that a device does in the same way each time, whatever is in the batch."""
        loss, probability = self.forward(batch)
        self.dense_optimizer.zero_grad()
        loss.backward()
        self.dense_gradients.start_bottom()
        self.clock.lap("backward")
        self.sparse_optimizer.step(batch.lookups)
        self.clock.lap("optimizer: tables")
        self.dense_gradients.finish()
        self.dense_optimizer.step()
        self.clock.lap("optimizer: dense")
        return loss.detach(), probability.detach()

    def forward(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Returns loss and click probabilities of this rank's samples."""
        with self.backend.autocast():
            probability = self.model(batch.dense, batch.lookups)
        loss = self.loss(probability, batch.target)
        self.clock.lap("forward: dense")
        return loss, probability

    # -- The loop

    def run(self) -> float:
        """Trains, or infers; returns the loss that was printed last. Raises Stopped if a signal ends the run."""
        self.mlperf.stop("init")
        self.mlperf.start("run")
        try:
            with self.signals:
                return self.evaluator.infer() if self.options.inference_only else self.train()
        finally:
            self.mlperf.stop("run", status="success" if self.progress.best.reached(self.options) else "aborted")

    def train(self) -> float:
        """Trains from where the run stands to the end of the last epoch, or to a threshold that a test reaches."""
        first_epoch, first_iteration = self.progress.epoch, self.progress.iteration
        for epoch in range(first_epoch, self.options.nepochs):
            if epoch > first_epoch:
                self.progress.epoch, self.progress.iteration, self.progress.printed = epoch, 0, 0
            block = self.mlperf.period("block", first_epoch_num=epoch + 1, epoch_count=1)
            with block, self.mlperf.period("epoch", epoch_num=epoch + 1):
                self.train_epoch(first_iteration if epoch == first_epoch else 0)
            if self.progress.best.reached(self.options):
                break
        if self.options.save_model and not self.due(self.options.save_every):
            self.save()
        return self.progress.train_loss

    def train_epoch(self, first_iteration: int) -> None:
        self.clock.start()
        for batch in self.batches(first_iteration):
            self.clock.lap("wait")
            with self.ranks.watch("a training step"):
                self.metrics.add(*self.train_step(batch), batch.target)
                self.clock.end_iteration(self.backend.end_step())
            self.progress.iteration += self.options.mlperf_grad_accum_iter
            self.finish_iteration()
            if reached := self.progress.best.reached(self.options):
                tqdm.write(reached)
                return

    def finish_iteration(self) -> None:
        """Prints, tests, saves and stops, whatever is due between two steps."""
        tests = self.due(self.options.iterations_between_tests)
        if tests or self.due(self.options.print_freq):
            self.print_line(len(self.data))
        if tests:
            self.evaluator.test()
        if self.due(self.options.save_every):
            self.save()
        if signal_number := self.ranks.signal_agreed_by_all_ranks(self.signals.received):
            if self.options.save_model and not self.due(self.options.save_every):
                self.save()
            raise Stopped(signal_number)

    def due(self, frequency: int) -> bool:
        """Says whether the iteration is a multiple of `frequency`, or the epoch's last one; never if that is 0 or
        less."""
        iteration, width = self.progress.iteration, self.options.mlperf_grad_accum_iter
        passed = frequency > 0 and iteration // frequency > (iteration - width) // frequency
        return passed or (frequency > 0 and iteration == len(self.data))

    def batches(self, first_iteration: int = 0) -> Iterable[PreparedBatch]:
        """Returns the batches of an epoch, with a progress bar where stderr is a terminal."""
        width, hidden = self.options.mlperf_grad_accum_iter, self.ranks.rank > 0 or None
        steps = (len(self.data) - first_iteration) // width
        batches = self.data.batches(0 if self.options.measure_perf else first_iteration, width)
        prepared = self.prepared(repeat_first(batches, steps) if self.options.measure_perf else batches)
        return tqdm(prepared, f"epoch {self.progress.epoch}", steps, leave=False, unit="it", disable=hidden)

    def print_line(self, iterations: int) -> None:
        """Prints a line on the iterations since the last one, whose clock and metrics start anew. Raises RunError for a
        loss that is not finite."""
        per_step = 1 if self.options.inference_only else self.options.mlperf_grad_accum_iter
        with self.ranks.watch("the wait for the device before a line is printed"):
            milliseconds = self.clock.settle() / per_step
            self.metrics.sum_over(self.ranks)
            loss, accuracy, finite_iterations = self.metrics.read()
        self.reporter.line(self.progress, iterations, milliseconds, loss, accuracy)
        self.reporter.memory(self.backend)
        if not np.isfinite(loss) and not self.options.allow_nan:
            first = self.progress.printed + finite_iterations * per_step + 1
            rate = self.schedule.rate(self.progress.step)
            raise loss_is_not_finite(self.options, self.progress.epoch, first, loss, rate)
        self.progress.printed, self.progress.train_loss = self.progress.iteration, loss
        self.clock.start()

    # -- Checkpoints

    def save(self) -> None:
        with self.ranks.watch("the wait for the device before a checkpoint is written"):
            self.backend.synchronize()
        checkpoint.save(self.options.save_model, self)
        tqdm.write(f"Saving model to {self.options.save_model}")  # only now, as the line is a promise
        self.clock.end_pause()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is no tensor of the model, between two steps: the reference script's keys, and our own."""
        ours = {
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "metrics": self.ranks.gather_objects(self.metrics.state()),
            "random": torch.get_rng_state(),  # the same on all ranks
        }
        lengths = {"nepochs": self.options.nepochs, "nbatches": len(self.data), "nbatches_test": len(self.test_data)}
        return lengths | self.progress.for_reference_script() | {"trainer": ours}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called, or where the reference script wrote `state`."""
        if ours := state.get("trainer"):
            progress = dict(ours["progress"])
            self.progress = Progress(**progress | {"best": Best(**progress["best"])})
            self.metrics.load(ours["metrics"], self.ranks)
            torch.set_rng_state(ours["random"].clone())
        else:
            self.progress = Progress.of_reference_script(state, self.options)
        self.sparse_optimizer.updates = self.progress.step

    def is_done(self) -> bool:
        """Says whether a checkpoint left nothing to train."""
        epochs = self.progress.epoch + self.progress.iteration // len(self.data)
        ended = epochs >= self.options.nepochs or bool(self.progress.best.reached(self.options))
        return ended and not self.options.inference_only

    def report(self, loss: float) -> RunReport:
        return make_report(self.options, self.backend, self.ranks, self.model, self.clock, self.pipeline, loss)


def loss_is_not_finite(options: Options, epoch: int, iteration: int, loss: float, rate: float) -> RunError:
    """Returns the error that names the first iteration whose loss was not finite, and what to try."""
    with_rate = "" if options.inference_only else f", with a learning rate of {rate:g}"
    return RunError(
        f"the loss of iteration {iteration} of epoch {epoch} is {loss}{with_rate}; try another "
        f"{'--load-model' if options.inference_only else '--learning-rate'}, or --allow-nan to go on"
    )


def repeat_first(batches: Iterable[T], count: int) -> Iterator[T]:
    """Yields the first batch `count` times, for `--measure-perf`."""
    return itertools.repeat(next(iter(batches)), count)


class Evaluator:
    """Tests during training, and inference: forward passes over the test data, and how good their predictions are."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.options, self.ranks = trainer, trainer.options, trainer.ranks
        self.data = trainer.test_data

    @functools.cached_property
    def pipeline(self) -> BatchPipeline:
        """The host's part; a run that never tests allocates no buffers for it."""
        return BatchPipeline(self.data, self.trainer.backend, ranks=self.ranks.size, watch=self.ranks.watch)

    def test(self) -> None:
        """Prints the scores on the test data. Does not change what training goes on with."""
        trainer, progress = self.trainer, self.trainer.progress
        epoch = {"epoch_num": progress.epoch + progress.iteration / len(trainer.data)}
        with trainer.mlperf.period("eval", **epoch):
            scores = self.evaluate(self.data.batches())
            trainer.mlperf.event(epoch, eval_accuracy=scores.auc)
        self.print_scores(scores, len(trainer.data))
        trainer.clock.start()

    def infer(self) -> float:
        """Runs over the test data, timed and printed as in training; then prints the scores. Returns the loss that was
        printed last."""
        trainer, iterations = self.trainer, len(self.data)
        for epoch in range(self.options.nepochs):
            trainer.progress = Progress(epoch)
            trainer.clock.start()
            batches = self.data.batches()
            batches = repeat_first(batches, iterations) if self.options.measure_perf else batches
            self.print_scores(self.evaluate(batches, self.finish_inference), iterations)
        return trainer.progress.train_loss

    def finish_inference(self, iteration: int, loss: Tensor, probability: Tensor, target: Tensor) -> None:
        """Counts, prints and stops, whatever is due after a batch of inference."""
        trainer = self.trainer
        trainer.metrics.add(loss, probability, target)
        trainer.clock.end_iteration(trainer.backend.end_step())
        trainer.progress.iteration = iteration
        if iteration % self.options.print_freq == 0 or iteration == len(self.data):
            trainer.print_line(len(self.data))
        if signal_number := self.ranks.signal_agreed_by_all_ranks(trainer.signals.received):
            raise Stopped(signal_number)

    def evaluate(self, batches: Iterable[Batch], after_batch: Callable[..., None] = lambda *_: None) -> Scores:
        """Returns the scores of all samples. Predictions stay on the device until all are there. The pipeline ends each
        step, if `after_batch` does not."""
        outputs = []
        prepared = self.pipeline.run(batches)  # its buffers are ordinary tensors, made outside of inference mode
        with torch.inference_mode():
            for iteration, batch in enumerate(prepared, start=1):
                with self.ranks.watch("a step of a test"):
                    loss, probability, target = self.step(batch)
                outputs.append((probability, target.clone()))  # the next batch overwrites the target
                after_batch(iteration, loss, probability, target)
            probability, target = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            with self.ranks.watch("the wait for the device at the end of a test"):
                loss = self.trainer.loss(probability, target).item()
            return Scores.of(loss, probability, target)

    def step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, click probabilities and targets of all ranks' samples, without those that fill up the batch."""
        trainer = self.trainer
        trainer.clock.lap("wait")
        loss, probability = trainer.forward(batch)
        probability, target = self.ranks.gather_samples(probability, batch.target)
        if self.ranks.size > 1 or batch.samples < len(target):
            probability, target = probability[: batch.samples], target[: batch.samples]
            loss = trainer.loss(probability, target)
        return loss, probability, target

    def print_scores(self, scores: Scores, iterations: int) -> None:
        progress = self.trainer.progress
        progress.test_accuracy, progress.test_auc = scores.accuracy, scores.auc
        progress.best.update(scores)
        self.trainer.reporter.scores(progress, iterations, scores)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after training: what is checked, and what is printed
# ---------------------------------------------------------------------------------------------------------------------


def cross_weights(options: Options, width: int) -> int:
    """Returns the number of weights of all cross layers of the given width, without the few of their biases."""
    if options.arch_interaction_op != "dcn":
        return 0
    return options.dcn_num_layers * width * (2 * options.dcn_low_rank_dim or width)


def cross_values(options: Options, width: int) -> int:
    """Returns how many numbers per sample the cross layers of the given width hold at once, at least.

    A backward pass needs each layer's input, its product and what W was multiplied by, and it makes three gradients
    as wide as the input. Inference needs the first input, the product and the sum.
    """
    if options.arch_interaction_op != "dcn":
        return 0
    if options.inference_only:
        return 3 * width
    per_layer = 2 * width + options.dcn_low_rank_dim
    return options.dcn_num_layers * per_layer + 3 * width


def outputs_of_mlps(options: Options, width: int) -> int:
    """Returns how many numbers per sample the MLPs and the interaction, of the given width, hold at once, at least: all
    their outputs for a backward pass, or else the largest."""
    outputs = [*options.arch_mlp_bot[1:], width, *options.arch_mlp_top]
    return max(outputs) if options.inference_only else sum(outputs)


def needed_memory(options: Options, backend: Backend, ranks: Ranks) -> dict[str, float]:
    """Returns the bytes that this rank's part of the model and of a batch takes, by what it is for."""
    with_gradient_and_moment = {"sgd": 8, "adagrad": 12, "rwsadagrad": 12}[options.optimizer]
    bytes_per_dense_weight = 4 if options.inference_only else with_gradient_and_moment
    interaction = backend.interactions[options.arch_interaction_op]
    features = 1 + len(options.arch_embedding_size)
    width = interaction(features, options.embedding_dim, options.arch_interaction_itself).width
    mlps = (options.arch_mlp_bot, (width, *options.arch_mlp_top))
    lookups = sum(options.lookups_per_bag[piece.table] for piece in ranks.held_pieces)
    bytes_of_values = {"fp32": 4, "bf16": 2}[options.data_type] * (batch_size(options) // ranks.size)
    return {
        "the tables (--arch-embedding-size)": bytes_per_weight(options)  # their gradient takes no memory
        * (table_numbers(options) if ranks.size == 1 else sum(piece.elements for piece in ranks.held_pieces)),
        "the MLPs (--arch-mlp-bot, --arch-mlp-top)": bytes_per_dense_weight
        * sum(n * m for mlp in mlps for n, m in pairwise(mlp)),
        "the cross layers (--dcn-num-layers)": bytes_per_dense_weight * cross_weights(options, width),
        "the cross layers' values of a batch (--mini-batch-size)": bytes_of_values * cross_values(options, width),
        "the MLPs' outputs for a batch (--mini-batch-size)": bytes_of_values * outputs_of_mlps(options, width),
        "the lookups of a batch (--num-indices-per-lookup)": batch_size(options)
        * lookups
        * backend.embedding_bags.bytes_per_lookup(options.embedding_dim),
    }


def check_memory(options: Options, backend: Backend, ranks: Ranks) -> None:
    """Raises UsageError, before anything is allocated, if this rank's part of the model and of a batch do not fit."""
    needed, limit = needed_memory(options, backend, ranks), ranks.expected_memory_per_rank(backend)
    largest = max(needed, key=needed.get)
    if sum(needed.values()) > limit:
        raise UsageError(
            f"this run needs {sum(needed.values()) / 2**30:,.1f} GiB, {needed[largest] / 2**30:,.1f} GiB of it "
            f"for {largest}, but {backend.device.type} has {limit / 2**30:,.1f} GiB free"
        )


def print_header(options: Options, given: dict, backend: Backend, ranks: Ranks) -> None:
    print("flags:", *to_argv(given))
    print(ranks)
    for note in [*backend.notes(options), *flags_without_effect(options, given)]:
        print(note)
    print(f"Using {backend.device.type.upper()}...")
    if options.discarded_samples:
        print(
            f"The last {options.discarded_samples} of {options.samples_per_epoch + options.discarded_samples} samples "
            f"are discarded: they do not fill a batch of {options.samples_per_step}."
        )


def print_architecture(options: Options, model: DLRM_Net) -> None:
    print("model arch:")
    print("mlp top arch, with input to output dimensions:", model.interaction.width, *options.arch_mlp_top)
    print("mlp bot arch, with input to output dimensions:", *options.arch_mlp_bot)
    print("# of features (sparse and dense):", 1 + len(options.arch_embedding_size))
    print("# of embeddings:", len(options.arch_embedding_size), "with rows:", *options.arch_embedding_size)
    print("embedding dimension:", options.embedding_dim)


def print_data(data: Data) -> None:
    print("data (inputs and targets):")
    for number, batch in enumerate(data):
        print("mini-batch:", number)
        print(batch.dense.numpy())
        for table, indices in enumerate(batch.indices):
            print("table", table, "offsets", batch.offsets[table].tolist(), "indices", indices.tolist())
        print(batch.target.numpy())


def print_parameters(title: str, model: DLRM_Net, ranks: Ranks) -> None:
    print(title, "parameters (weights and bias):")
    for name, parameter in ranks.whole_state(model.state_dict()).items():
        print(name)
        print(parameter.cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------------


def select_backend(options: Options, launch: Launch | None = None) -> Backend:
    """Returns the back end that `--device` names. Raises UsageError, saying what to do, if there is no such device."""
    if options.device == "hpu" or (options.device == "auto" and not why_no_gaudi()):
        return HpuBackend(options)
    if options.hpu_graphs:
        raise UsageError("--hpu-graphs works on a Gaudi alone; use --device=hpu, or leave the flag out")
    if options.device == "cuda":
        return CudaBackend(options, launch.local_rank if launch else 0)
    return CpuBackend(options, why_no_gaudi() if options.device == "auto" else "")


def run(given: dict) -> RunReport | None:
    """A whole run with the settings `{field of Options: value}`. Returns None if there is nothing to train. Raises
    UsageError or RunError, with one line for the user, if the run cannot start or go on."""
    launch = find_launch()
    with rank_0_speaks(launch, given.get("print_all_ranks", False)):
        options = Options(**given)
        if options.print_plan and not launch.by:
            launch = Launch(size=options.world_size, local_size=options.world_size)  # as if all were on this host
        check_launch(options, given, launch)
        data_set = open_data_set(dataclasses.replace(options, world_size=launch.size))
        options = data_set.options
        backend = select_backend(options, launch)
        if options.print_plan:
            print(make_plan(options, launch.size, expected_memory_per_rank(launch, backend)))
            return None
        with join_ranks(data_set, launch, backend) as ranks:
            return run_rank(data_set, given, backend, ranks)


def run_rank(data_set: DataSet, given: dict, backend: Backend, ranks: Ranks) -> RunReport | None:
    """Checks, prints the header and trains, on this rank."""
    options = data_set.options
    ranks.run_on_all(lambda: check_memory(options, backend, ranks))
    with contextlib.ExitStack() as held:
        ranks.run_on_all(lambda: check_places(options, ranks, held))
        check_exports(options)
        torch.manual_seed(options.numpy_rand_seed)
        np.set_printoptions(precision=options.print_precision)
        torch.set_printoptions(precision=options.print_precision)
        observer = None if ranks.rank else held.enter_context(observers(options))
        print_header(options, given, backend, ranks)
        return train(data_set, backend, ranks, observer)


def check_places(options: Options, ranks: Ranks, held: contextlib.ExitStack) -> None:
    """Raises UsageError, on rank 0, if a file cannot be written where the flags want it. Until `held` is closed, no
    other run may save to the same `--save-model`."""
    if ranks.rank:
        return
    if options.report:
        check_writable("--report", options.report)
    if options.save_model:
        held.enter_context(reserved(options.save_model))


def train(data_set: DataSet, backend: Backend, ranks: Ranks, observer: Observer | None) -> RunReport | None:
    """Trains, or infers, and writes what the flags ask for. Returns None if there is nothing to train."""
    options = data_set.options
    trainer = Trainer(data_set, backend, ranks, observer)
    for note in trainer.mlperf.notes:
        print(note)
    trainer.mlperf.describe(options, trainer.test_data.samples)
    if checkpoint.load(trainer, options) and trainer.is_done():
        print("Nothing is left to train.")
        return None
    if options.debug_mode:
        print_architecture(options, trainer.model)
        print_data(trainer.data)
        print_parameters("initial", trainer.model, ranks)
    if options.plot_compute_graph:
        print("Compute graph drawn to", *plot_compute_graph(trainer.model, options))
    print("Testing for inference only" if options.inference_only else "time/loss/accuracy (if enabled):")
    with trainer.profiler:
        loss = trainer.run()
    report = trainer.report(loss)
    if options.debug_mode and not options.inference_only:
        print_parameters("updated", trainer.model, ranks)
    if options.save_onnx:
        print("Model exported to", save_onnx(trainer.model, options))
    if options.print_time:
        print(report)
    if options.report and not ranks.rank:
        report.write(options.report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Returns its exit status: 0; 1 for a run that failed; 2 for flags that cannot work; 130 for
    Ctrl-C; 143 for SIGTERM."""
    sys.stdout.reconfigure(line_buffering=True)  # lines reach a pipe as they are printed
    parser = OptionParser(prog="dlrm_s_pytorch.py", description=__doc__.splitlines()[0])
    try:
        run(parser.parse_given(sys.argv[1:] if argv is None else argv))
        return 0
    except KeyboardInterrupt:
        return stopped(parser.prog, Stopped(signal.SIGINT))
    except Stopped as stop:
        return stopped(parser.prog, stop)
    except SystemExit as silent:  # another rank says why
        return silent.code
    except Exception as error:
        return end_by(parser.prog, error)


def stopped(program: str, stop: Stopped) -> int:
    print(f"{program}: {stop}", file=sys.stderr)
    return stop.exit_status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(main())
