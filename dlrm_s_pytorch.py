"""Train the Deep Learning Recommendation Model (Naumov et al., arXiv:1906.00091) on a Gaudi, a CPU or a GPU.

    python dlrm_s_pytorch.py --num-batches=100 --mini-batch-size=128 --print-time     on a Gaudi, else on the CPU
    python dlrm_s_pytorch.py --device=cuda ...                                         on a CUDA GPU
    python dlrm_s_pytorch.py --help                                                    every flag

From top to bottom as a run goes: model, training step, metrics, training, main. `demo_dlrm.py` calls this script with
the flags of a file in `hb_configs/`; the flags are declared in `dlrm/options.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

from dlrm.distributed.launch import prepare_program
from dlrm.errors import RunError, UsageError
from dlrm.options import OptionParser, Options, to_argv

if __name__ == "__main__":
    prepare_program(sys.argv[1:])  # a Gaudi plugin may come in with torch, and then reads it

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlrm.checkpoint import checkpoint
from dlrm.checkpoint.checkpoint import Progress
from dlrm.checkpoint.file import is_checkpoint_folder
from dlrm.data.data_set import DataSet, open_data_set
from dlrm.data.random_data import RandomData
from dlrm.distributed.launch import Launch, find_launch
from dlrm.distributed.placement import Piece, bytes_per_weight, make_plan
from dlrm.distributed.ranks import OneRank, expected_memory_per_rank, on_all_ranks
from dlrm.distributed.rendezvous import check_launch, join_ranks, leave, rank_0_speaks
from dlrm.evaluation import Scores, test_line
from dlrm.kernels.ops import PreparedLookups
from dlrm.kernels.special_tables import SpecialTables, table_numbers
from dlrm.output.export import check_exports, plot_compute_graph, save_onnx
from dlrm.output.mlperf import MlperfLog
from dlrm.output.plots import Observer, observers
from dlrm.output.profile import NoProfiler, Profiler
from dlrm.output.report import RunReport, StepClock, batch_size, make_report
from dlrm.pipeline import BatchPipeline, PreparedBatch
from dlrm.system.files import check_writable
from dlrm.system.signals import Stopped, StopSignals
from dlrm_habana_kernels import Backend, DenseLayer, select_backend, set_learning_rate

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


WEIGHTS_PER_BLOCK = 2**20  # weights that are drawn at a time


class MLP(nn.Module):
    """Fully connected layers, each with its ReLU."""

    def __init__(self, layers: Iterable[DenseLayer]):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(2 * number), layer)  # in checkpoints, a ReLU has always had a number of its own

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs of the first layer) -> (B, outputs of the last)."""
        for layer in self.children():
            x = layer(x)
        return x


class DLRM_Net(nn.Module):  # the name that every DLRM script uses
    """Dense features through the bottom MLP, lookups through embedding bags, their interaction through the top MLP."""

    def __init__(self, options: Options, backend: Backend, held: Sequence[Piece] = ()):
        """Draws weights in the order of the public script: tables, bottom MLP, top MLP. So equal seeds train alike.
        Of the tables, it keeps the pieces `held`, or all."""
        super().__init__()
        generator = np.random.RandomState(options.numpy_rand_seed)
        dim, num_features = options.embedding_dim, 1 + len(options.arch_embedding_size)
        interaction = backend.interactions[options.arch_interaction_op]
        self.interaction = interaction(num_features, dim, options.arch_interaction_itself)
        if options.special_tables:
            self.emb_l = SpecialTables(options, partial(draw_whole_table, generator))
        else:
            row_type = torch.bfloat16 if options.table_data_type == "bf16" else torch.float32
            tables = draw_tables(generator, options, held)
            origins = [(piece.table, piece.first_row) for piece in held]
            self.emb_l = backend.embedding_bags((table.to(row_type) for table in tables), origins)
        self.v_W_l = nn.ParameterList(self.emb_l.learned_row_weights)
        self.bot_l = draw_mlp(generator, options.arch_mlp_bot, backend, ends_in_relu=True)
        top_widths = (self.interaction.width, *options.arch_mlp_top)
        self.top_l = draw_mlp(generator, top_widths, backend, ends_in_relu=False)
        self.loss_threshold = options.loss_threshold

    def forward(self, dense: Tensor, lookups: PreparedLookups) -> Tensor:
        """Click probabilities, (B, 1) float32."""
        return self.click_probability(dense, self.emb_l(lookups), lookups)

    def click_probability(self, dense: Tensor, looked_up: Tensor, lookups: PreparedLookups) -> Tensor:
        """The model but for the reading of tables: (B, dense features) and what was read -> (B, 1) float32."""
        return self.top(self.bottom(dense), self.emb_l.pool(looked_up, lookups))

    def bottom(self, dense: Tensor) -> Tensor:
        """(B, dense features) -> (B, D)"""
        return self.bot_l(dense)

    def top(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, D), (B, T, D) -> (B, 1) float32."""
        logit = self.top_l(self.interaction(features, pooled))
        probability = torch.sigmoid(logit.float())  # in bf16, probabilities above 0.996 would all be 1
        if self.loss_threshold > 0:
            probability = probability.clamp(self.loss_threshold, 1 - self.loss_threshold)
        return probability

    def dense_layers(self) -> list[DenseLayer]:
        return [*self.bot_l.children(), *self.top_l.children()]


def draw_tables(generator: np.random.RandomState, options: Options, held: Sequence[Piece]) -> Iterable[Tensor]:
    """The pieces `held`, or all tables, in order. What is not held is drawn as well, but not kept."""
    dim = options.arch_sparse_feature_size
    for table, rows in enumerate(options.arch_embedding_size):
        pieces = [piece for piece in held or (Piece(table, 0, rows, 0, dim),) if piece.table == table]
        yield from draw_table(generator, rows, dim, pieces)


def draw_whole_table(generator: np.random.RandomState, rows: int, dim: int) -> Tensor:
    return draw_table(generator, rows, dim, [Piece(0, 0, rows, 0, dim)])[0]


def draw_table(generator: np.random.RandomState, rows: int, dim: int, pieces: Sequence[Piece]) -> list[Tensor]:
    """Pieces of a table (rows, dim), float32, uniform in +-sqrt(1 / rows)."""
    bound, block_rows = np.sqrt(1 / rows), max(1, WEIGHTS_PER_BLOCK // dim)
    parts = [torch.empty(piece.rows, piece.columns) for piece in pieces]
    for first in range(0, rows, block_rows):
        block = torch.from_numpy(generator.uniform(-bound, bound, (min(block_rows, rows - first), dim)))
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_rows(block, first, part)
    return parts


def draw_mlp(generator: np.random.RandomState, widths: Sequence[int], backend: Backend, ends_in_relu: bool) -> MLP:
    *before, last = pairwise(widths)
    layers = [backend.layer(*draw_layer(generator, n, m), relu=True) for n, m in before]
    return MLP([*layers, backend.layer(*draw_layer(generator, *last), relu=ends_in_relu)])


def draw_layer(generator: np.random.RandomState, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs), normal of variance 2 / (inputs + outputs), then bias (outputs,), of 1 / outputs."""
    weight_deviation, bias_deviation = np.sqrt(2 / (inputs + outputs)), np.sqrt(1 / outputs)
    weight = draw((outputs, inputs), lambda count: generator.normal(0, weight_deviation, count))
    return weight, draw((outputs,), lambda count: generator.normal(0, bias_deviation, count))


def draw(shape: Sequence[int], numbers) -> Tensor:
    """float32 from the float64 that `numbers(count)` draws, a block at a time: no copy of a large table in float64."""
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
        """`dtype` is what losses are weighed and averaged in."""
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=dtype))

    def forward(self, probability: Tensor, target: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy(probability, target, reduction="none")
        return (torch.where(target < 1, *self.weights) * losses).mean()


def make_loss(options: Options, backend: Backend):
    """The loss function (probability, target) -> mean over the batch, for (B, 1) float32 tensors."""
    if options.loss_function == "wbce":
        return WeightedBCELoss(options.loss_weights, backend.wide_dtype).to(backend.device)
    return functional.mse_loss if options.loss_function == "mse" else functional.binary_cross_entropy


class Metrics:
    """Loss and accuracy since the last printed line, kept on the device until they are read."""

    def __init__(self, device: torch.device):
        self._loss = torch.zeros((), device=device)
        self._hits, self._finite = torch.zeros(2, 1, dtype=torch.int32, device=device)
        self._samples = 0

    def add(self, loss: Tensor, probability: Tensor, target: Tensor) -> None:
        """A hit is a prediction on its target's side of 0.5; where targets are 0 and 1, hits are the accuracy."""
        self._loss = self._loss + loss * len(target)
        self._hits += ((probability > 0.5) == (target > 0.5)).sum(dtype=torch.int32)
        self._finite += self._loss.isfinite()  # once it is not, it stays so
        self._samples += len(target)

    def sum_over(self, ranks: OneRank) -> None:
        """Makes the counters those of all ranks."""
        self._loss, self._hits = ranks.total(self._loss, self._hits)
        self._finite = ranks.smallest(self._finite)
        self._samples *= ranks.size

    def read(self) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent, and the iterations before the first loss that was not finite; starts anew.
        Waits for the device."""
        loss, accuracy = (self._loss / self._samples).item(), 100 * self._hits.item() / self._samples
        finite = -1 if np.isfinite(loss) else self._finite.item()
        for counter in (self._loss, self._hits, self._finite):
            counter.zero_()
        self._samples = 0
        return loss, accuracy, finite

    def state(self) -> dict:
        """For a checkpoint: what `load` takes."""
        counters = {"loss": self._loss, "hits": self._hits, "finite": self._finite}
        return {name: counter.cpu() for name, counter in counters.items()} | {"samples": self._samples}

    def load(self, states: Sequence[dict], ranks: OneRank) -> None:
        """The `state` of each rank."""
        state = states[ranks.rank] if len(states) == ranks.size else metrics_of_other_world_size(states, ranks)
        device = self._loss.device
        self._loss, self._hits, self._finite = (state[name].clone().to(device) for name in ("loss", "hits", "finite"))
        self._samples = state["samples"]


def metrics_of_other_world_size(states: Sequence[dict], ranks: OneRank) -> dict:
    """`Metrics.state` of more or fewer ranks than there are now: rank 0 takes their sums, the others none."""
    share = 0 if ranks.rank else 1
    return {
        "loss": share * sum(state["loss"] for state in states),
        "hits": share * sum(state["hits"] for state in states),
        "finite": min(state["finite"] for state in states),
        "samples": sum(state["samples"] for state in states) // ranks.size,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class LearningRateSchedule:
    """A linear rise to the base rate, then that; from a given step on a fall along a parabola, then what that left."""

    lowest = 1e-7

    def __init__(self, options: Options):
        self.base, self.warm_up = options.learning_rate, options.lr_num_warmup_steps
        self.decay_start, self.decay_steps = options.lr_decay_start_step, options.lr_num_decay_steps

    def rate(self, step: int) -> float:
        """Of the optimizer step of this number; the first is 1."""
        if step < self.warm_up:
            return self.base * step / self.warm_up
        if step < self.decay_start or not self.decay_steps:
            return self.base
        left = max(self.decay_steps - (step - self.decay_start), 1)
        return min(self.base, max(self.lowest, self.base * (left / self.decay_steps) ** 2))


class Trainer:
    """A model, its data and its optimizers on a device, and the loop that brings them together."""

    def __init__(
        self, data_set: DataSet, backend: Backend, ranks: OneRank | None = None, observer: Observer | None = None
    ):
        options = data_set.options
        ranks = ranks or OneRank(options)
        self.options, self.backend, self.ranks, self.observer = options, backend, ranks, observer or Observer()
        self.mlperf = MlperfLog(options, ranks.rank)
        self.mlperf.event(cache_clear=True)
        self.mlperf.start("init")
        self.data, self.test_data = map(ranks.share, (data_set.training_data(), data_set.test_data()))
        self.model = DLRM_Net(options, backend, ranks.held).to(backend.device)
        self.loss = make_loss(options, backend)
        self.dense_gradients = ranks.dense_gradients(self.model)
        self.forward_dense = ranks.forward(self.model, self.loss, backend, self.dense_gradients)
        self.pipeline = self.make_pipeline()
        self.optimizers = []  # none in inference: moments take as much memory as weights
        if not options.inference_only:
            self.dense_optimizer = backend.dense_optimizer(self.model.dense_layers(), options)
            self.sparse_optimizer = backend.sparse_optimizer(self.model.emb_l, options)
            self.optimizers += [self.dense_optimizer, self.sparse_optimizer]
        self.repeated_update = backend.repeated(self.update)
        self.schedule, self.learning_rate = LearningRateSchedule(options), options.learning_rate
        self.metrics = Metrics(backend.device)
        self.profiler = Profiler(options, backend) if options.enable_profiling and not ranks.rank else NoProfiler()
        self.clock = StepClock(backend, self.profiler.lap)
        self.progress = Progress()
        self.signals = StopSignals()

    def make_pipeline(self) -> BatchPipeline:
        if self.options.inference_only:
            return BatchPipeline(self.test_data, self.backend, ranks=self.ranks.size)
        return BatchPipeline(self.data, self.backend, self.options.samples_per_step, self.ranks.size)

    @functools.cached_property
    def test_pipeline(self) -> BatchPipeline:
        if self.options.inference_only:
            return self.pipeline
        return BatchPipeline(self.test_data, self.backend, ranks=self.ranks.size)

    def run(self) -> float:
        """Training, or inference; returns the loss printed last. Stopped if a signal ends it."""
        self.mlperf.stop("init")
        self.mlperf.start("run")
        try:
            with self.signals:
                return self.infer() if self.options.inference_only else self.train()
        finally:
            self.mlperf.stop("run", status="success" if self.progress.best.reached(self.options) else "aborted")

    def train(self) -> float:
        """From where the run stands to the end of the last epoch, or to a threshold that a test reaches."""
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
            self.metrics.add(*self.train_step(batch), batch.target)
            self.clock.end_iteration()
            self.progress.iteration += self.options.mlperf_grad_accum_iter
            self.finish_iteration()
            if reached := self.progress.best.reached(self.options):
                tqdm.write(reached)
                return

    def finish_iteration(self) -> None:
        """What is due between two steps."""
        tests = self.due(self.options.test_freq)
        if tests or self.due(self.options.print_freq):
            self.progress.train_loss = self.print_line(self.progress.iteration, len(self.data))
        if tests:
            self.test()
        if self.due(self.options.save_every):
            self.save()
        if signal_number := self.ranks.signal_agreed_by_all_ranks(self.signals.received):
            self.stop(signal_number)

    def due(self, frequency: int) -> bool:
        """At each multiple of `frequency` iterations, and at the last one of an epoch; never where it is 0 or less."""
        iteration, width = self.progress.iteration, self.options.mlperf_grad_accum_iter
        passed = frequency > 0 and iteration // frequency > (iteration - width) // frequency
        return passed or (frequency > 0 and iteration == len(self.data))

    def stop(self, signal_number: int) -> None:
        if self.options.save_model and not self.due(self.options.save_every):
            self.save()
        raise Stopped(signal_number)

    def save(self) -> None:
        checkpoint.save(self.options.save_model, self)
        tqdm.write(f"Saving model to {self.options.save_model}")  # once it is there: the line is a promise
        self.clock.end_pause()

    def batches(self, first_iteration: int = 0) -> Iterable[PreparedBatch]:
        """The batches of an epoch, with a progress bar where stderr is a terminal."""
        width = self.options.mlperf_grad_accum_iter
        steps = (len(self.data) - first_iteration) // width
        batches = self.data.batches(0 if self.options.measure_perf else first_iteration, width)
        return self.with_progress_bar(self.pipeline.run(self.measured(batches, steps)), steps)

    def measured(self, batches: Iterable, count: int) -> Iterable:
        """With `--measure-perf`, the first batch `count` times."""
        return itertools.repeat(next(iter(batches)), count) if self.options.measure_perf else batches

    def with_progress_bar(self, batches: Iterable[PreparedBatch], count: int) -> Iterable[PreparedBatch]:
        title = f"epoch {self.progress.epoch}"
        return tqdm(batches, desc=title, total=count, unit="it", leave=False, disable=self.ranks.rank > 0 or None)

    def infer(self) -> float:
        """Forward passes over the test data, timed and printed as in training; then how good they were."""
        iterations = len(self.test_data)
        for epoch in range(self.options.nepochs):
            self.progress = Progress(epoch)
            self.clock.start()
            scores = self.evaluate(self.measured(self.test_data.batches(), iterations), self.finish_inference)
            self.print_scores(scores, iterations, iterations)
        return self.progress.train_loss

    def finish_inference(self, iteration: int, loss: Tensor, probability: Tensor, target: Tensor) -> None:
        """What is due after a batch."""
        self.metrics.add(loss, probability, target)
        self.clock.end_iteration()
        self.progress.iteration = iteration
        if iteration % self.options.print_freq == 0 or iteration == len(self.test_data):
            self.progress.train_loss = self.print_line(iteration, len(self.test_data))
        if signal_number := self.ranks.signal_agreed_by_all_ranks(self.signals.received):
            raise Stopped(signal_number)

    def test(self) -> None:
        """Prints the scores on the test data. Training does not notice."""
        progress = self.progress
        epoch = {"epoch_num": progress.epoch + progress.iteration / len(self.data)}
        with self.mlperf.period("eval", **epoch):
            scores = self.evaluate(self.test_data.batches())
            self.mlperf.event(epoch, eval_accuracy=scores.auc)
        self.print_scores(scores, progress.iteration, len(self.data))
        self.clock.start()

    def evaluate(self, batches: Iterable, after_batch: Callable[..., None] = lambda *_: None) -> Scores:
        """The scores of all samples; they stay on the device to the end."""
        outputs = []
        batches = self.test_pipeline.run(batches)
        with torch.inference_mode():
            for iteration, batch in enumerate(batches, start=1):
                loss, probability, target = self.inference_step(batch)
                outputs.append((probability, target.clone()))  # the next batch will take the place of the target
                after_batch(iteration, loss, probability, target)
            probability, target = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            return Scores.of(self.loss(probability, target).item(), probability, target)

    def print_scores(self, scores: Scores, iteration: int, iterations: int) -> None:
        progress = self.progress
        progress.test_accuracy, progress.test_auc = scores.accuracy, scores.auc
        self.observe("Test", Acc=100 * scores.accuracy, AUC=scores.auc, Loss=scores.loss)
        progress.best.update(scores)
        line = test_line(iteration, iterations, progress.epoch, scores, progress.best, self.options.mlperf_logging)
        tqdm.write(line)

    def train_step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Forward, backward, update. Returns loss and click probabilities, which stay on the device."""
        self.set_learning_rate()
        loss, probability = self.repeated_update(batch)
        self.backend.mark_step()
        self.progress.step += 1
        return loss, probability

    def update(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """`train_step` on the device: the same work each time, whatever is in the batch."""
        loss, probability = self.forward(batch)
        self.dense_optimizer.zero_grad()
        loss.backward()
        self.dense_gradients.start_bottom()
        self.clock.lap("backward")
        self.sparse_optimizer.step()
        self.clock.lap("optimizer: tables")
        self.dense_gradients.finish()
        self.dense_optimizer.step()
        self.clock.lap("optimizer: dense")
        return loss.detach(), probability.detach()

    def set_learning_rate(self) -> None:
        """Of the step that begins; where it is still the same, the optimizers are left alone."""
        rate = self.schedule.rate(self.progress.step + 1)
        if rate != self.learning_rate:
            for optimizer in self.optimizers:
                set_learning_rate(optimizer, rate)
            self.learning_rate = rate

    def inference_step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Forward alone. Returns loss, click probabilities and targets of the samples that count, on all ranks."""
        self.clock.lap("wait")
        loss, probability = self.forward(batch)
        probability, target = self.ranks.all_samples(probability, batch.target)
        if self.ranks.size > 1 or batch.samples < len(target):
            probability, target = probability[: batch.samples], target[: batch.samples]
            loss = self.loss(probability, target)
        self.backend.mark_step()
        return loss, probability, target

    def forward(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        looked_up = self.model.emb_l(batch.lookups)
        self.clock.lap("forward: lookup")
        loss, probability = self.forward_dense(batch.dense, looked_up, batch.lookups, batch.target)
        self.clock.lap("forward: dense")
        return loss, probability

    def print_line(self, iteration: int, iterations: int) -> float:
        """Prints the iterations since the last line, in the format that scripts parse; returns their loss."""
        milliseconds = self.clock.settle() / (1 if self.options.inference_only else self.options.mlperf_grad_accum_iter)
        self.metrics.sum_over(self.ranks)
        loss, accuracy, finite = self.metrics.read()
        line = (
            f"Finished {'inference' if self.options.inference_only else 'training'} it {iteration}/{iterations} "
            f"of epoch {self.progress.epoch}, {milliseconds if self.options.print_time else -1:.2f} ms/it, "
            f"loss {loss:.6f}, accuracy {accuracy:3.3f} %"
        )
        if self.options.print_wall_time:
            line += time.strftime(" (%H:%M)")
        tqdm.write(line)
        if self.options.print_dist_loss:
            tqdm.write(f" Distributed Loss :: {loss:.6f}")
        phase = "Test" if self.options.inference_only else "Train"
        self.observe(phase, Loss=loss, Accuracy=accuracy, ms_per_it=milliseconds)
        if self.options.log_device_mem_alloc:
            now, peak = self.backend.memory_in_use()
            tqdm.write(f"Memory in use: {now / 2**30:.3f} GiB, at most {peak / 2**30:.3f} GiB")
        if not np.isfinite(loss) and not self.options.allow_nan:
            first = self.progress.printed + finite * self.options.mlperf_grad_accum_iter + 1
            rate = "" if self.options.inference_only else f", with a learning rate of {self.learning_rate:g}"
            raise RunError(
                f"the loss of iteration {first} of epoch {self.progress.epoch} is {loss}{rate}; try another "
                f"{'--load-model' if self.options.inference_only else '--learning-rate'}, or --allow-nan to go on"
            )
        self.progress.printed = iteration
        self.clock.start()
        return loss

    def is_done(self) -> bool:
        """Whether a checkpoint left nothing to train."""
        epochs = self.progress.epoch + self.progress.iteration // len(self.data)
        ended = epochs >= self.options.nepochs or bool(self.progress.best.reached(self.options))
        return ended and not self.options.inference_only

    def observe(self, phase: str, **values: float) -> None:
        """Tells the observer what a line says; `phase` is Train or Test."""
        iterations = len(self.test_data if self.options.inference_only else self.data)
        step = self.progress.epoch * iterations + self.progress.iteration
        self.observer.observe(step, {f"{phase}/{quantity}": value for quantity, value in values.items()})

    def report(self, loss: float) -> RunReport:
        return make_report(self.options, self.backend, self.ranks, self.model, self.clock, self.pipeline, loss)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed before and after training
# ---------------------------------------------------------------------------------------------------------------------


def check_memory(options: Options, backend: Backend, ranks: OneRank) -> None:
    """UsageError, before anything is allocated, if this rank's part of the model and of a batch do not fit."""
    with_gradient_and_moment = {"sgd": 8, "adagrad": 12, "rwsadagrad": 12}[options.optimizer]
    bytes_a_weight = 4 if options.inference_only else with_gradient_and_moment
    interaction = (1 + len(options.arch_embedding_size)) * options.embedding_dim
    mlps = (options.arch_mlp_bot, (interaction, *options.arch_mlp_top))
    lookups = len(ranks.held) * options.num_indices_per_lookup
    needed = {
        "the tables (--arch-embedding-size)": bytes_per_weight(options)  # their gradient takes no memory
        * (table_numbers(options) if ranks.size == 1 else sum(piece.elements for piece in ranks.held)),
        "the MLPs (--arch-mlp-bot, --arch-mlp-top)": bytes_a_weight
        * sum(n * m for mlp in mlps for n, m in pairwise(mlp)),
        "a batch (--mini-batch-size)": 4 * batch_size(options) * (lookups + max(map(max, mlps)) // ranks.size),
    }
    largest, limit = max(needed, key=needed.get), ranks.memory_limit(backend)
    if sum(needed.values()) > limit:
        raise UsageError(
            f"this run needs {sum(needed.values()) / 2**30:,.1f} GiB, {needed[largest] / 2**30:,.1f} GiB of it "
            f"for {largest}, but {backend.device.type} has {limit / 2**30:,.1f} GiB free"
        )


def print_header(options: Options, given: dict, backend: Backend, ranks: OneRank) -> None:
    print("flags:", *to_argv(given))
    print(ranks)
    for note in backend.notes(options):
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


def print_data(data: RandomData) -> None:
    print("data (inputs and targets):")
    for number, batch in enumerate(data):
        print("mini-batch:", number)
        print(batch.dense.numpy())
        for table, indices in enumerate(batch.indices):
            print("table", table, "offsets", batch.offsets[table].tolist(), "indices", indices.tolist())
        print(batch.target.numpy())


def print_parameters(title: str, model: DLRM_Net, ranks: OneRank) -> None:
    print(title, "parameters (weights and bias):")
    for name, parameter in ranks.whole_state(model.state_dict()).items():
        print(name)
        print(parameter.cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def run(given: dict) -> RunReport | None:
    """A whole run with the settings `{field of Options: value}`; None where there is nothing to train. UsageError and
    RunError say why there is none."""
    launch = find_launch()
    with rank_0_speaks(launch, given.get("print_all_ranks", False)):
        options = Options(**given)
        if options.print_plan and not launch.by:
            launch = Launch(size=options.world_size, local_size=options.world_size)  # as if they were on this host
        check_launch(options, given, launch)
        data_set = open_data_set(dataclasses.replace(options, world_size=launch.size))
        options = data_set.options
        backend = select_backend(options)
        if options.print_plan:
            print(make_plan(options, launch.size, expected_memory_per_rank(launch, backend)))
            return None
        with join_ranks(data_set, launch, backend) as ranks:
            return run_rank(data_set, given, backend, ranks)


def run_rank(data_set: DataSet, given: dict, backend: Backend, ranks: OneRank) -> RunReport | None:
    """The part of a run that a rank has; all of it where there is one."""
    options = data_set.options
    on_all_ranks(ranks, lambda: check_memory(options, backend, ranks))
    on_all_ranks(ranks, lambda: check_places(options, ranks))
    check_exports(options)
    torch.manual_seed(options.numpy_rand_seed)
    np.set_printoptions(precision=options.print_precision)
    torch.set_printoptions(precision=options.print_precision)

    with contextlib.nullcontext() if ranks.rank else observers(options) as observer:
        print_header(options, given, backend, ranks)
        return train(data_set, backend, ranks, observer)


def check_places(options: Options, ranks: OneRank) -> None:
    """UsageError, on rank 0, if a file can't be written where it is wanted."""
    if ranks.rank:
        return
    if options.report:
        check_writable("--report", options.report)
    if options.save_model:
        check_writable("--save-model", options.save_model, replaces_folder=is_checkpoint_folder(options.save_model))


def train(data_set: DataSet, backend: Backend, ranks: OneRank, observer: Observer | None) -> RunReport | None:
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
    """The exit status: 0, 1 for a run that failed, 2 for flags that can't work, 130 for Ctrl-C, 143 for SIGTERM."""
    sys.stdout.reconfigure(line_buffering=True)  # lines reach a pipe as they are printed
    parser = OptionParser(prog="dlrm_s_pytorch.py", description=__doc__.splitlines()[0])
    try:
        run(parser.parse_given(sys.argv[1:] if argv is None else argv))
        return 0
    except (UsageError, RunError) as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")  # at once: other ranks may write, too
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return stopped(parser.prog, Stopped(signal.SIGINT))
    except Stopped as stop:
        return stopped(parser.prog, stop)
    except SystemExit as silent:  # another rank says why
        return silent.code


def stopped(program: str, stop: Stopped) -> int:
    print(f"{program}: {stop}", file=sys.stderr)
    return stop.exit_status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(main())
