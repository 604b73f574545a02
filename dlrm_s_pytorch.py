"""Train the Deep Learning Recommendation Model (Naumov et al., arXiv:1906.00091) on a Gaudi, a CPU or a GPU.

    python dlrm_s_pytorch.py --num-batches=100 --mini-batch-size=128 --print-time     on a Gaudi, else on the CPU
    python dlrm_s_pytorch.py --device=cuda ...                                         on a CUDA GPU
    python dlrm_s_pytorch.py --help                                                    every flag

From top to bottom as a run goes: model, training step, metrics, training, main. `demo_dlrm.py` calls this script with
the flags of a file in `hb_configs/`; the flags are declared in `dlrm_options.py`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

from dlrm_options import OptionParser, Options, RunError, UsageError, prepare_environment, to_argv

if __name__ == "__main__":
    prepare_environment(sys.argv[1:])  # a Gaudi plugin may come in with torch, and then reads it

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlrm_data_pytorch import RandomData, make_data, with_data_set
from dlrm_habana_kernels import Backend, BatchPipeline, DenseLayer, PreparedBatch, select_backend
from dlrm_ops import PreparedLookups
from dlrm_report import RunReport, StepClock, check_report_path, make_report

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


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

    def __init__(self, options: Options, backend: Backend):
        """Draws weights in the order of the public script: tables, bottom MLP, top MLP. So equal seeds train alike."""
        super().__init__()
        generator = np.random.RandomState(options.numpy_rand_seed)
        dim, num_features = options.arch_sparse_feature_size, 1 + len(options.arch_embedding_size)
        interaction = backend.interactions[options.arch_interaction_op]
        self.interaction = interaction(num_features, dim, options.arch_interaction_itself)
        self.emb_l = backend.embedding_bags(draw_table(generator, rows, dim) for rows in options.arch_embedding_size)
        self.bot_l = draw_mlp(generator, options.arch_mlp_bot, backend, ends_in_relu=True)
        top_widths = (self.interaction.width, *options.arch_mlp_top)
        self.top_l = draw_mlp(generator, top_widths, backend, ends_in_relu=False)
        self.loss_threshold = options.loss_threshold

    def forward(self, dense: Tensor, lookups: PreparedLookups) -> Tensor:
        """Click probabilities, (B, 1) float32."""
        return self.click_probability(dense, self.emb_l(lookups), lookups)

    def click_probability(self, dense: Tensor, looked_up: Tensor, lookups: PreparedLookups) -> Tensor:
        """The model but for the reading of tables: (B, dense features) and what was read -> (B, 1) float32."""
        pooled = self.emb_l.pool(looked_up, lookups)
        logit = self.top_l(self.interaction(self.bot_l(dense), pooled))
        probability = torch.sigmoid(logit.float())  # in bf16, probabilities above 0.996 would all be 1
        if self.loss_threshold > 0:
            probability = probability.clamp(self.loss_threshold, 1 - self.loss_threshold)
        return probability

    def dense_layers(self) -> list[DenseLayer]:
        return [*self.bot_l.children(), *self.top_l.children()]


def draw_table(generator: np.random.RandomState, rows: int, dim: int) -> Tensor:
    """(rows, dim) float32, uniform in +-sqrt(1 / rows)."""
    bound = np.sqrt(1 / rows)
    return draw((rows, dim), lambda count: generator.uniform(-bound, bound, count))


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
    for block in tensor.view(-1).split(2**20):
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

    def read(self) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent, and the iterations before the first loss that was not finite; starts anew.
        Waits for the device."""
        loss, accuracy = (self._loss / self._samples).item(), 100 * self._hits.item() / self._samples
        finite = -1 if np.isfinite(loss) else self._finite.item()
        for counter in (self._loss, self._hits, self._finite):
            counter.zero_()
        self._samples = 0
        return loss, accuracy, finite


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """A model, its data and its optimizers on a device, and the loop that brings them together."""

    def __init__(self, options: Options, backend: Backend):
        self.options, self.backend = options, backend
        self.data = make_data(options)
        self.model = DLRM_Net(options, backend).to(backend.device)
        self.loss = make_loss(options, backend)
        self.click_probability = backend.compile(self.model.click_probability)
        self.pipeline = BatchPipeline(self.data, backend)
        self.dense_optimizer = backend.dense_optimizer(self.model.dense_layers(), options)
        self.sparse_optimizer = backend.sparse_optimizer(self.model.emb_l, options)
        self.metrics = Metrics(backend.device)
        self.clock = StepClock(backend)

    def run(self) -> float:
        """All epochs of training, or of inference; returns the loss printed last."""
        step = self.inference_step if self.options.inference_only else self.train_step
        loss = float("nan")
        for epoch in range(self.options.nepochs):
            self.clock.start()
            for iteration, batch in enumerate(self.batches(epoch), start=1):
                self.clock.lap("wait")
                self.metrics.add(*step(batch), batch.target)
                self.clock.end_iteration()
                if iteration % self.options.print_freq == 0 or iteration == len(self.data):
                    loss = self.print_line(epoch, iteration)
                    self.clock.start()
        return loss

    def batches(self, epoch: int) -> Iterable[PreparedBatch]:
        """The batches of an epoch, with a progress bar where stderr is a terminal."""
        batches = iter(self.data)
        if self.options.measure_perf:
            batches = itertools.repeat(next(batches), len(self.data))
        return tqdm(
            self.pipeline.run(batches),
            desc=f"epoch {epoch}",
            total=len(self.data),
            unit="it",
            leave=False,
            disable=None,
        )

    def train_step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Forward, backward, update. Returns loss and click probabilities, which stay on the device."""
        loss, probability = self.forward(batch)
        self.dense_optimizer.zero_grad()
        loss.backward()
        self.clock.lap("backward")
        self.sparse_optimizer.step()
        self.clock.lap("optimizer: tables")
        self.dense_optimizer.step()
        self.backend.mark_step()
        self.clock.lap("optimizer: dense")
        return loss.detach(), probability.detach()

    @torch.no_grad()
    def inference_step(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Forward alone."""
        loss, probability = self.forward(batch)
        self.backend.mark_step()
        return loss, probability

    def forward(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        looked_up = self.model.emb_l(batch.lookups)
        self.clock.lap("forward: lookup")
        with self.backend.autocast():
            probability = self.click_probability(batch.dense, looked_up, batch.lookups)
        loss = self.loss(probability, batch.target)
        self.clock.lap("forward: dense")
        return loss, probability

    def print_line(self, epoch: int, iteration: int) -> float:
        """Prints the iterations since the last line, in the format that scripts parse; returns their loss."""
        milliseconds = self.clock.settle()
        loss, accuracy, finite = self.metrics.read()
        line = (
            f"Finished {'inference' if self.options.inference_only else 'training'} it {iteration}/{len(self.data)} "
            f"of epoch {epoch}, {milliseconds if self.options.print_time else -1:.2f} ms/it, "
            f"loss {loss:.6f}, accuracy {accuracy:3.3f} %"
        )
        if self.options.print_wall_time:
            line += time.strftime(" (%H:%M)")
        tqdm.write(line)
        if self.options.log_device_mem_alloc:
            now, peak = self.backend.memory_in_use()
            tqdm.write(f"Memory in use: {now / 2**30:.3f} GiB, at most {peak / 2**30:.3f} GiB")
        if not np.isfinite(loss) and not self.options.allow_nan:
            first = (iteration - 1) // self.options.print_freq * self.options.print_freq + finite + 1
            raise RunError(
                f"the loss of iteration {first} of epoch {epoch} is {loss}, with --learning-rate="
                f"{self.options.learning_rate:g}; try a smaller one, or --allow-nan to go on"
            )
        return loss

    def report(self, loss: float) -> RunReport:
        return make_report(self.options, self.backend, self.model, self.clock, self.pipeline, loss)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed before and after training
# ---------------------------------------------------------------------------------------------------------------------


def check_memory(options: Options, backend: Backend) -> None:
    """UsageError, before anything is allocated, if the model and a batch do not fit."""
    copies = {"sgd": 2, "adagrad": 3}[options.optimizer]  # weight and gradient; Adagrad keeps a moment, too
    copies = 1 if options.inference_only else copies
    interaction = (1 + len(options.arch_embedding_size)) * options.arch_sparse_feature_size
    mlps = (options.arch_mlp_bot, (interaction, *options.arch_mlp_top))
    lookups = len(options.arch_embedding_size) * options.num_indices_per_lookup
    needed = {
        "the tables (--arch-embedding-size)": max(copies - 1, 1)  # their gradient takes no memory
        * options.arch_sparse_feature_size
        * sum(options.arch_embedding_size),
        "the MLPs (--arch-mlp-bot, --arch-mlp-top)": copies * sum(n * m for mlp in mlps for n, m in pairwise(mlp)),
        "a batch (--mini-batch-size)": options.mini_batch_size * (lookups + max(map(max, mlps))),
    }
    largest, limit = max(needed, key=needed.get), backend.memory_limit()
    if 4 * sum(needed.values()) > limit:
        raise UsageError(
            f"this run needs {4 * sum(needed.values()) / 2**30:,.1f} GiB, {4 * needed[largest] / 2**30:,.1f} GiB of it "
            f"for {largest}, but {backend.device.type} has {limit / 2**30:,.1f} GiB free"
        )


def print_header(options: Options, given: dict, backend: Backend) -> None:
    print("flags:", *to_argv(given))
    print("world size: 1, current rank: 0, local rank: 0")
    for note in backend.notes:
        print(note)
    print(f"Using {backend.device.type.upper()}...")
    if options.discarded_samples:
        print(
            f"The last {options.discarded_samples} of {options.data_size} samples are discarded: they do not fill a "
            f"batch of {options.mini_batch_size}."
        )


def print_architecture(options: Options, model: DLRM_Net) -> None:
    print("model arch:")
    print("mlp top arch, with input to output dimensions:", model.interaction.width, *options.arch_mlp_top)
    print("mlp bot arch, with input to output dimensions:", *options.arch_mlp_bot)
    print("# of features (sparse and dense):", 1 + len(options.arch_embedding_size))
    print("# of embeddings:", len(options.arch_embedding_size), "with rows:", *options.arch_embedding_size)
    print("embedding dimension:", options.arch_sparse_feature_size)


def print_data(data: RandomData) -> None:
    print("data (inputs and targets):")
    for number, batch in enumerate(data):
        print("mini-batch:", number)
        print(batch.dense.numpy())
        for table, indices in enumerate(batch.indices):
            print("table", table, "offsets", batch.offsets[table].tolist(), "indices", indices.tolist())
        print(batch.target.numpy())


def print_parameters(title: str, model: DLRM_Net) -> None:
    print(title, "parameters (weights and bias):")
    for name, parameter in model.named_parameters():
        print(name)
        print(parameter.detach().cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def run(given: dict) -> RunReport:
    """A whole run with the settings `{field of Options: value}`; UsageError and RunError say why there is none."""
    options = with_data_set(Options(**given))
    backend = select_backend(options)
    check_memory(options, backend)
    if options.report:
        check_report_path(options.report)
    torch.manual_seed(options.numpy_rand_seed)
    np.set_printoptions(precision=options.print_precision)
    torch.set_printoptions(precision=options.print_precision)

    print_header(options, given, backend)
    trainer = Trainer(options, backend)
    if options.debug_mode:
        print_architecture(options, trainer.model)
        print_data(trainer.data)
        print_parameters("initial", trainer.model)
    print("Testing for inference only" if options.inference_only else "time/loss/accuracy (if enabled):")
    report = trainer.report(trainer.run())
    if options.debug_mode and not options.inference_only:
        print_parameters("updated", trainer.model)
    if options.print_time:
        print(report)
    if options.report:
        report.write(options.report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for a run that failed, 2 for flags that can't work, 130 for Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # lines reach a pipe as they are printed
    parser = OptionParser(prog="dlrm_s_pytorch.py", description=__doc__.splitlines()[0])
    try:
        run(parser.parse_given(sys.argv[1:] if argv is None else argv))
        return 0
    except (UsageError, RunError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
