"""Every flag of the trainer, declared once.

`Options` holds one field per setting: its default, its meaning, and how its text is read. The command line of
`dlrm_s_pytorch.py`, the launcher `demo_dlrm.py` and the keys of `hb_configs/*.yaml` are all made from these fields, so
they cannot drift apart. Nothing here imports torch: the launcher answers at once, and the environment can be set before
torch is imported. A Gaudi plugin may load together with torch, and reads the environment then.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import itertools
import math
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dlrm.errors import UsageError
from dlrm.system.files import name_without_endings

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "hb_configs"
LONGEST_NAME = 255  # bytes in the name of a file, on all usual file systems
INT32_MAX = 2**31 - 1  # lookups travel as int32, the index type of the Gaudi kernels


# ---------------------------------------------------------------------------------------------------------------------
# Readers: turn the text of a flag into its value, or say in an ArgumentTypeError what would be right
# ---------------------------------------------------------------------------------------------------------------------


def _expected(what: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {what}, got {text!r}")


def integer(minimum: int | None = None, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """Returns a reader of integers from `minimum` to `maximum`, both included."""
    what = "an integer" if minimum is None else f"an integer from {minimum}"
    if minimum is not None and maximum < 2**63 - 1:
        what += f" to {maximum}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _expected(what, text) from None
        if (minimum is not None and value < minimum) or value > maximum:
            raise _expected(what, text)
        return value

    return read


def number(minimum: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """Returns a reader of finite numbers of at least `minimum` and less than `below`."""
    what = "a finite number"
    if minimum > -math.inf:
        what += f" of at least {minimum:g}"
    if below < math.inf:
        what += f" and below {below:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _expected(what, text) from None
        if not (math.isfinite(value) and minimum <= value < below):
            raise _expected(what, text)
        return value

    return read


def iterations_or_part(text: str) -> int | float:
    """Reads a number of iterations, or a part of an epoch."""
    read = integer(-1) if text.lstrip("-").isdecimal() else number(math.ulp(0.0), 1)
    try:
        return read(text)
    except argparse.ArgumentTypeError:
        raise _expected("an integer from -1, or a part of an epoch between 0 and 1, such as 0.05", text) from None


def name_of_file(text: str) -> str:
    """Reads a path. A part that is longer than file systems allow would end in an error wherever it is looked up."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split(os.sep)):
        raise argparse.ArgumentTypeError(f"a name in this path has more than {LONGEST_NAME} bytes: {text[:60]!r}...")
    return text


def byte_count(text: str) -> int:
    """Reads a number of bytes: `"4G"` is 4 * 2**30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise _expected("a size in bytes, such as 512M or 4G", text)
    return int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " ")))


def sizes(text: str) -> tuple[int, ...]:
    """Reads positive int32 numbers joined by dashes: `"13-512-16"` is `(13, 512, 16)`."""
    try:
        values = tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise _expected("positive integers joined by dashes such as 13-512-16", text) from None
    for value in values:
        if not 1 <= value <= INT32_MAX:
            raise _expected(f"every size from 1 to {INT32_MAX}", text)
    return values


def class_weights(text: str) -> tuple[float, float]:
    """Reads two numbers joined by a dash: `"0.3-1.7"` is `(0.3, 1.7)`. The dash in 1e-5 does not separate."""
    try:
        negative, positive = (number(minimum=0)(part) for part in re.split(r"(?<![eE])-", text))
    except (ValueError, argparse.ArgumentTypeError):
        raise _expected("two numbers of at least 0 joined by a dash, for class 0 and class 1", text) from None
    return negative, positive


def boolean(text: str) -> bool:
    """Reads true, 1, yes, false, 0 or no, in any case of letters."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise _expected("true or false", text)
    return values[text.lower()]


def one_of(*choices: str, **old_names: str) -> Callable[[str], str]:
    """Returns a reader of one of `choices`, or of an old name of one of them: `old_names` maps old to new names."""

    def read(text: str) -> str:
        value = old_names.get(text, text)
        if value not in choices:
            raise _expected(f"one of {', '.join(choices)}", text)
        return value

    return read


# ---------------------------------------------------------------------------------------------------------------------
# The flags
# ---------------------------------------------------------------------------------------------------------------------

# What --help shows in the place of a value, by the type of the default.
PLACEHOLDERS = {bool: "BOOL", int: "N", float: "X", str: "NAME", tuple: "N-N-..."}


def option(
    default: Any,
    meaning: str,
    read: Callable[[str], Any] | None = str,
    *,
    group: str | None = None,
    spellings: Sequence[str] = (),
    placeholder: str | None = None,
    shown_default: str | None = None,
    common: bool = False,
    old: bool = False,
    available: bool = True,
) -> Any:
    """Declares a flag: returns a dataclass field that `OptionParser` makes a flag of.

    `read` turns the text of the flag into its value; None declares a flag that takes no value. `group` opens a group of
    flags, to which the fields below belong until the next group. `spellings` are further names of the flag. An option
    that is not `available` is known by name, but refused when set.

    --help shows `meaning`, with `placeholder` in the place of a value and `shown_default` as the default; both follow
    from `default` unless they are given. A text that has a `placeholder` is the name of a file or folder. A `common`
    flag comes first in --help, and an `old` flag, which is accepted for old command lines, comes last.
    """
    if read is str and placeholder:
        read = name_of_file
    details = {"meaning": meaning, "read": read, "group": group, "spellings": spellings, "available": available}
    details |= {"placeholder": placeholder or PLACEHOLDERS[type(default)], "common": common, "old": old}
    if shown_default is None:
        shown_default = str(default).lower() if isinstance(default, bool) else as_text(default)
    return dataclasses.field(default=default, metadata=details | {"shown_default": shown_default})


def as_text(value: Any) -> str:
    """Returns the text that a flag reads back as `value`: `"13-512-16"` for `(13, 512, 16)`."""
    return "-".join(map(as_text, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Options:
    """All settings of a run. Field `mini_batch_size` is flag `--mini-batch-size`; `--mini_batch_size` works as well."""

    # fmt: off
    device: str = option("auto", "the device: auto (a Gaudi if there is one, else the CPU), cpu, hpu (a Gaudi) or cuda "
                         "(a GPU)", one_of("auto", "cpu", "hpu", "cuda"), group="where and how to run", common=True)
    mode: str = option("eager", "how the model runs: eager, lazy (on a Gaudi; elsewhere the same as eager) or compile "
                       "(by torch.compile)", one_of("eager", "lazy", "compile", "cpu", custom="eager"), common=True)
    data_type: str = option("fp32", "the data type in which the MLPs and the interaction compute: fp32 or bf16",
                            one_of("fp32", "bf16"), spellings=("-d",), common=True)
    world_size: int = option(1, "the number of ranks, each with its own device; demo_dlrm.py starts them", integer(1),
                             spellings=("-w",), common=True)
    numpy_rand_seed: int = option(123, "the seed of the initial weights, of random data and of shuffling",
                                  integer(0, 2**32 - 1))
    hmp_bf16: str = option(str(CONFIG_FOLDER / "ops_bf16_dlrm.txt"), "Gaudi: the file of ops that run in bf16, one per "
                           "line", placeholder="FILE", shown_default="hb_configs/ops_bf16_dlrm.txt")
    hmp_fp32: str = option(str(CONFIG_FOLDER / "ops_fp32_dlrm.txt"), "Gaudi: the file of ops that stay in fp32, one "
                           "per line", placeholder="FILE", shown_default="hb_configs/ops_fp32_dlrm.txt")
    hmp_opt_level: str = option("O1", "has no effect: autocast has no levels", old=True)
    hmp_verbose: bool = option(False, "has no effect: autocast prints nothing", boolean, old=True)
    gemm: str = option("auto", "CPU: what computes the matrix products of fp32 layers: default (torch's default), "
                       "onednn, native (our own kernel), or auto (the fastest, timed once per large layer)",
                       one_of("auto", "default", "onednn", "native"))
    lookup_preprocessing: str = option("own", "Gaudi: the op that groups equal lookups: own (the trainer's own op) or "
                                       "plugin (the op of the Gaudi plugin)", one_of("own", "plugin"))
    hpu_kernels: str = option("auto", "Gaudi: what reads and updates tables and MLPs: native (operators of torch), "
                              "plugin (the Gaudi plugin's own kernels, which need lazy mode and Adagrad), or auto "
                              "(plugin wherever it can be, else native)", one_of("auto", "plugin", "native"))
    hpu_graphs: bool = option(False, "Gaudi, lazy mode: record a training step once, and replay it from then on",
                              boolean)

    local_rank: int = option(-1, "has no effect: the launcher's variables say which rank a process is", integer(-1),
                             group="several ranks", old=True)
    distributed: bool = option(False, "refuse to run unless a launcher started this process as a rank", boolean)
    dist_backend: str = option("", "the torch.distributed backend; by default gloo on a CPU, hccl on a Gaudi, nccl on "
                               "a GPU")
    dist_timeout: int = option(300, "the seconds after which a rank that does not answer ends the run",
                               integer(1, 10**6))
    sharding: str = option("auto", "how tables are split over the ranks: table (tables stay whole), row or column "
                           "(every table is cut), or auto (tables stay whole, but are cut by rows where they are too "
                           "large or too few)", one_of("auto", "table", "row", "column"))
    print_plan: bool = option(False, "print which rank holds which parts of the tables, and exit", boolean)
    sync_dense_params: bool = option(True, "has no effect: the replicas of the MLPs are always in step", boolean,
                                     old=True)

    arch_sparse_feature_size: int = option(2, "the embedding dimension D, which is also the last width of the bottom "
                                           "MLP", integer(1, INT32_MAX), group="model")
    arch_embedding_size: tuple[int, ...] = option((4, 3, 2), "the number of rows of each table", sizes)
    arch_mlp_bot: tuple[int, ...] = option((4, 3, 2), "the widths of the bottom MLP; the first is the number of dense "
                                           "features", sizes)
    arch_mlp_top: tuple[int, ...] = option((4, 2, 1), "the widths of the top MLP without the width of its input, which "
                                           "follows from the interaction; the last is 1", sizes)
    arch_interaction_op: str = option("dot", "how features interact: dot (pairwise dot products), cat "
                                      "(concatenation) or dcn (concatenation, then cross layers)",
                                      one_of("dot", "cat", "dcn"))
    dcn_num_layers: int = option(3, "dcn: the number of cross layers", integer(1))
    dcn_low_rank_dim: int = option(512, "dcn: the rank of the matrix of a cross layer, the product of two; 0 for one "
                                   "matrix of full rank", integer(0, INT32_MAX))
    arch_interaction_itself: bool = option(False, "dot: also multiply each feature by itself", boolean)
    table_data_type: str = option("fp32", "the data type of table rows: fp32, or bf16 with stochastic rounding, so "
                                  "that small updates add up", one_of("fp32", "bf16"))
    activation_function: str = option("relu", "the activation of every layer but the last, which ends in a sigmoid: "
                                      "relu", one_of("relu"))
    loss_function: str = option("bce", "the loss: mse, bce, or wbce (bce with a weight per class)",
                                one_of("mse", "bce", "wbce"))
    loss_weights: tuple[float, float] = option((1.0, 1.0), "wbce: the weights of class 0 and class 1", class_weights,
                                               placeholder="X-X")
    loss_threshold: float = option(0.0, "clamp predictions to [X, 1 - X] if X is above 0", number(0, 0.5))
    weighted_pooling: str = option("", "give each row of a table a weight in its bags: fixed (always 1) or learned; by "
                                   "default rows have no weights", one_of("fixed", "learned"))
    md_flag: bool = option(False, "mixed dimensions: give large tables shorter rows", boolean)
    md_threshold: int = option(200, "mixed dimensions: the number of rows above which a table has shorter rows",
                               integer(0))
    md_temperature: float = option(0.3, "mixed dimensions: how much shorter rows are in tables of more rows; 0 for "
                                   "not at all", number(0))
    md_round_dims: bool = option(False, "mixed dimensions: round the lengths of rows to powers of two", boolean)
    qr_flag: bool = option(False, "quotient-remainder: compose the rows of a large table from the rows of two small "
                           "tables", boolean)
    qr_threshold: int = option(200, "quotient-remainder: the number of rows above which a table is composed",
                               integer(0))
    qr_operation: str = option("mult", "quotient-remainder: how two rows are composed: mult, add or concat; concat "
                               "gives rows of twice --arch-sparse-feature-size", one_of("mult", "add", "concat"))
    qr_collisions: int = option(4, "quotient-remainder: the number of rows that share one row of the quotient table",
                                integer(1, INT32_MAX))
    qr_init: str = option("even", "quotient-remainder: how rows are initialized: even (with the variance of an "
                          "ordinary table) or public (as the reference script does, with positive numbers only)",
                          one_of("even", "public"))

    data_generation: str = option("random", "the source of the data: random, synthetic (lookups repeat as in a "
                                  "recorded trace) or dataset", one_of("random", "synthetic", "dataset", "internal"),
                                  group="data")
    data_size: int = option(8, "the number of samples per epoch", integer(1))
    num_batches: int = option(0, "the number of batches per epoch; 0 leaves it to --data-size", integer(0), common=True)
    num_indices_per_lookup: tuple[int, ...] = option((10,), "the largest number of lookups per bag: one number, or one "
                                                     "per table joined by dashes", sizes)
    num_indices_per_lookup_fixed: bool = option(False, "draw exactly --num-indices-per-lookup lookups per bag; equal "
                                                "ones count once", boolean)
    round_targets: bool = option(False, "draw random targets of 0 or 1, not of any number between them", boolean)
    rand_data_dist: str = option("uniform", "the distribution of random lookups: uniform, gaussian or zipf",
                                 one_of("uniform", "gaussian", "zipf"))
    rand_data_alpha: float = option(1.05, "zipf: row r is looked up about in proportion to (r+1)**-X", number(0))
    rand_data_min: float = option(0.0, "gaussian: the smallest row", number())
    rand_data_max: float = option(1.0, "gaussian: the largest row", number())
    rand_data_mu: float = option(-1.0, "gaussian: the mean row; -1 is the middle between the smallest and the largest",
                                 number())
    rand_data_sigma: float = option(1.0, "gaussian: the standard deviation", number(0))
    num_workers: int = option(0, "the number of threads that read a data set ahead; random data needs none", integer(0))
    data_trace_file: str = option("./input/dist_emb_j.log", "synthetic: the file of a table's distribution of stack "
                                  "distances; the last j in its name stands for the number of the table",
                                  placeholder="FILE")
    data_trace_enable_padding: bool = option(False, "synthetic: draw no new rows once all rows have been seen", boolean)
    data_set: str = option("kaggle", "dataset: its name, kaggle or terabyte", one_of("kaggle", "terabyte"))
    raw_data_file: str = option("", "dataset: the text of the data set; for terabyte, the name of the day files "
                                "without _0, _1, ...", placeholder="FILE")
    processed_data_file: str = option("", "dataset: the folder of the preprocessed data, or an .npz file of the "
                                      "reference script", placeholder="PATH")
    data_randomize: str = option("total", "dataset: how training samples are shuffled: total, day (each day by itself) "
                                 "or none", one_of("total", "day", "none"))
    data_sub_sample_rate: float = option(0.0, "dataset: the share of negative samples that preprocessing drops",
                                         number(0, 1))
    max_ind_range: int = option(-1, "dataset: take category ids modulo N, which caps the rows of tables; -1 for no cap",
                                integer(-1, INT32_MAX))
    multi_hot_sizes: tuple[int, ...] = option((1,), "dataset: the lookups that each category is expanded to, as in "
                                              "MLPerf's DLRM-dcnv2: one number, or one per table joined by dashes",
                                              sizes)
    multi_hot_distribution_type: str = option("uniform", "dataset: how the lookups that come with a category are "
                                              "distributed: uniform or pareto", one_of("uniform", "pareto"))
    memory_map: bool = option(False, "dataset: read the *_reordered.npz files of the reference script, one day at a "
                              "time", boolean)
    dataset_multiprocessing: bool = option(False, "has no effect: preprocessing is always parallel", boolean,
                                           old=True)
    preprocess_memory: int = option(4 * 2**30, "dataset: the memory that preprocessing and the order of the samples "
                                    "may take", byte_count, placeholder="BYTES", shown_default="4G")
    on_bad_line: str = option("error", "dataset: what happens at a malformed line of text: error (the run ends) or "
                              "skip (the line is left out and counted)", one_of("error", "skip"))
    mlperf_bin_loader: bool = option(False, "dataset: read MLPerf's binary files, which are written from the data set "
                                     "if they are missing", boolean)
    mlperf_bin_shuffle: bool = option(False, "dataset: shuffle MLPerf's binary files by whole batches", boolean)

    mini_batch_size: int = option(1, "the number of samples per batch, over all ranks", integer(1, INT32_MAX),
                                  group="training", spellings=("-b",), common=True)
    nepochs: int = option(1, "the number of epochs", integer(1))
    learning_rate: float = option(0.01, "the learning rate", number(0), common=True)
    optimizer: str = option("sgd", "the optimizer: sgd, adagrad, or rwsadagrad (Adagrad with one moment per row of a "
                            "table)", one_of("sgd", "adagrad", "rwsadagrad"), common=True)
    optimizer_eps: float = option(1e-10, "Adagrad: what is added to the root of a moment before the division by it",
                                  number(0))
    adagrad_initial_accumulator: float = option(0.0, "Adagrad: the value of all moments before the first step",
                                                number(0))
    measure_perf: bool = option(False, "train on the first batch again and again, so that data costs no time",
                                boolean)
    allow_nan: bool = option(False, "go on when the loss is not finite", boolean)
    lr_num_warmup_steps: int = option(0, "the number of steps in which the learning rate rises to --learning-rate",
                                      integer(0))
    lr_decay_start_step: int = option(0, "the step at which the learning rate begins to fall, quadratically",
                                      integer(0))
    lr_num_decay_steps: int = option(0, "the number of steps in which the learning rate falls; 0 if it never falls",
                                     integer(0))
    mlperf_grad_accum_iter: int = option(1, "the number of batches per step, which takes their mean gradient",
                                         integer(1))

    inference_only: bool = option(False, "do not train; run forward passes over the test data", boolean,
                                  group="evaluation")
    test_freq: int | float = option(-1, "the number of iterations between tests, or a part of an epoch, such as 0.05; "
                                    "each epoch ends in a test, too; -1 for no tests", iterations_or_part)
    test_mini_batch_size: int = option(-1, "the number of samples per test batch; -1 for --mini-batch-size",
                                       integer(-1, INT32_MAX))
    test_num_workers: int = option(-1, "the number of threads that read test data ahead; -1 for --num-workers",
                                   integer(-1))
    quantize_mlp_with_bit: int = option(32, "the number of bits of MLP weights in inference", integer(8, 32),
                                        available=False)
    quantize_emb_with_bit: int = option(32, "the number of bits of table weights in inference", integer(4, 32),
                                        available=False)
    mlperf_logging: bool = option(False, "print more scores of tests, and MLPerf's log lines", boolean)
    mlperf_acc_threshold: float = option(0.0, "stop when a test reaches this accuracy, between 0 and 1; 0 for never",
                                         number(0))
    mlperf_auc_threshold: float = option(0.0, "stop when a test reaches this AUC, between 0 and 1; 0 for never",
                                         number(0))

    print_freq: int = option(1, "the number of iterations between printed lines", integer(1), group="output")
    print_time: bool = option(False, "measure the time per iteration, and print a report at the end", boolean,
                              common=True)
    time_phases: bool = option(False, "Gaudi, eager and compile mode: measure the phases of each iteration, too, which "
                               "makes it slower; other devices always do", boolean)
    print_wall_time: bool = option(False, "end each line with the time of day", boolean)
    print_precision: int = option(5, "the number of digits of printed tensors", integer(0, 17))
    report: str = option("", "write the report to this file as JSON", placeholder="FILE")
    debug_mode: bool = option(False, "print the architecture, the data and the parameters", boolean)
    log_device_mem_alloc: bool = option(False, "print the memory in use below each line", boolean)
    print_all_ranks: bool = option(False, "let every rank print, not rank 0 alone", boolean)
    print_dist_loss: bool = option(False, "print the loss over all ranks once more, below each line", boolean)
    output_folder: str = option(".", "the folder of the files whose names are fixed, such as dlrm_s_pytorch.json",
                                placeholder="FOLDER")
    enable_profiling: bool = option(False, "write a trace to dlrm_s_pytorch.json, and tables to dlrm_s_pytorch.prof",
                                    boolean)
    plot_compute_graph: bool = option(False, "draw the model to dlrm_s_pytorch_graph.dot and, with Graphviz, to .svg",
                                       boolean)
    save_onnx: bool = option(False, "export the trained model to dlrm_s_pytorch.onnx", boolean)
    tensor_board_filename: str = option("", "write TensorBoard logs to this folder", placeholder="FOLDER")
    plot: str = option("", "draw the loss, the accuracy and the time per iteration to this .png, .svg or .pdf file",
                       placeholder="FILE")

    save_model: str = option("", "write a checkpoint to this file (with several ranks, to this folder) at the end, "
                             "and when SIGTERM or Ctrl-C ends the run", placeholder="PATH", group="checkpoints",
                             common=True)
    save_every: int = option(0, "the number of iterations between checkpoints; 0 for none before the end", integer(0))
    load_model: str = option("", "start from the weights of this checkpoint", placeholder="PATH", common=True)
    resume: bool = option(False, "go on where the checkpoint of --load-model, else of --save-model, was written",
                          boolean)
    # fmt: on

    def __post_init__(self) -> None:
        self._check_where_and_how()
        self._check_available()
        self._check_model()
        self._check_data()
        self._check_optimizer()
        self._check_learning_rate()
        self._check_checkpoints()

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches per epoch. Samples that do not fill a step are left out."""
        return self._samples_of_epoch // self.samples_per_step * self.mlperf_grad_accum_iter

    @property
    def samples_per_step(self) -> int:
        """Number of samples per step, which takes --mlperf-grad-accum-iter batches."""
        return self.mini_batch_size * self.mlperf_grad_accum_iter

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples per epoch that fill steps."""
        return self.batches_per_epoch * self.mini_batch_size

    @property
    def embedding_dim(self) -> int:
        """Width D of a pooled output."""
        return self.arch_sparse_feature_size * (2 if self.qr_flag and self.qr_operation == "concat" else 1)

    @property
    def lookups_per_bag(self) -> tuple[int, ...]:
        """Largest number of lookups per bag in each table."""
        given = self.num_indices_per_lookup
        return given * len(self.arch_embedding_size) if len(given) == 1 else given

    @property
    def special_tables(self) -> str:
        """The flag that asks for tables of another kind, which are plain torch; empty if no flag does."""
        return next((flag(name) for name in ("qr_flag", "md_flag", "weighted_pooling") if getattr(self, name)), "")

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """Arguments of the optimizers' constructors beside the learning rate, by the names of torch.optim."""
        if self.optimizer == "sgd":
            return {}
        return {"eps": self.optimizer_eps, "initial_accumulator_value": self.adagrad_initial_accumulator}

    @property
    def discarded_samples(self) -> int:
        """Number of samples per epoch that are left out, because they do not fill a step."""
        return self._samples_of_epoch - self.samples_per_epoch

    @property
    def test_batch_size(self) -> int:
        """Number of samples per test batch."""
        return self.test_mini_batch_size if self.test_mini_batch_size > 0 else self.mini_batch_size

    @property
    def iterations_between_tests(self) -> int:
        """Number of iterations from one test to the next; 0 or less for no tests.

        A part of an epoch is rounded down to iterations, as MLPerf's rules for dlrm_dcnv2 want it, but not to none.
        """
        if isinstance(self.test_freq, int):
            return self.test_freq
        samples = Fraction(str(self.test_freq)) * self._samples_of_epoch
        return max(1, int(samples / self.mini_batch_size))

    @property
    def _step_in_words(self) -> str:
        if self.mlperf_grad_accum_iter == 1:
            return f"a batch of --mini-batch-size={self.mini_batch_size}"
        return (
            f"--mlperf-grad-accum-iter={self.mlperf_grad_accum_iter} batches of --mini-batch-size="
            f"{self.mini_batch_size}"
        )

    @property
    def _samples_of_epoch(self) -> int:
        asked_for = self.num_batches * self.mini_batch_size
        if self.data_generation == "dataset":  # has no more than --data-size samples
            return min(asked_for, self.data_size) or self.data_size
        return asked_for or self.data_size

    def _check_where_and_how(self) -> None:
        for name in ("hmp_bf16", "hmp_fp32"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise UsageError(f"{flag(name)}: there is no file {path!r}")
        if self.data_generation == "internal":
            raise UsageError("--data-generation=internal is not available; use random, synthetic or dataset")
        if self.world_size > 1:
            self._check_works_on_several_ranks()
        if self.hpu_graphs and self.mode != "lazy":
            raise UsageError(f"--hpu-graphs needs --mode=lazy, not {self.mode}")

    def _check_available(self) -> None:
        for field in dataclasses.fields(self):
            if not field.metadata["available"] and getattr(self, field.name) != field.default:
                raise UsageError(f"{flag(field.name)} is not available yet")

    def _check_works_on_several_ranks(self) -> None:
        for name in ("save_onnx", "plot_compute_graph", "hpu_graphs"):
            if getattr(self, name):
                raise UsageError(f"{flag(name)} works on one device alone so far; use --world_size=1")
        if self.special_tables:
            raise UsageError(f"{self.special_tables}: such tables can't be split over ranks; use --world_size=1")

    def _check_data_files(self) -> None:
        """Checks that the given files exist. Preprocessed data need not exist where the text does, and vice versa."""
        raw, processed = self.raw_data_file, self.processed_data_file
        if not raw and not processed:
            raise UsageError("--data-generation=dataset needs --raw-data-file or --processed-data-file")
        # The text may be gone if the data that was preprocessed from it lies beside it, under the name of the text.
        beside = f"{glob.escape(name_without_endings(Path(raw)))}*"
        if raw and not processed and not any(Path(raw).parent.glob(beside)):
            raise UsageError(f"--raw-data-file: there is no file {raw!r}")
        if processed and not raw and not any(Path(processed).parent.glob(f"{glob.escape(Path(processed).stem)}*")):
            raise UsageError(f"--processed-data-file: there is no file {processed!r}")

    def _check_model(self) -> None:
        if self.arch_mlp_bot[-1] != self.embedding_dim:
            twice = "" if self.embedding_dim == self.arch_sparse_feature_size else "twice "
            raise UsageError(
                f"--arch-mlp-bot ends in {self.arch_mlp_bot[-1]}, but must end in {twice}--arch-sparse-feature-size, "
                f"{self.embedding_dim}"
            )
        if self.special_tables and self.table_data_type != "fp32":
            raise UsageError(f"{self.special_tables} needs --table-data-type=fp32")
        if self.qr_flag and self.md_flag:
            raise UsageError("--qr-flag and --md-flag exclude each other")
        if self.arch_mlp_top[-1] != 1:
            raise UsageError(
                f"--arch-mlp-top ends in {self.arch_mlp_top[-1]}, but must end in 1, the click probability"
            )

    def _check_data(self) -> None:
        if self.data_generation == "dataset":
            self._check_data_files()  # whether they fill a step is checked once they are open
        else:
            self.check_fills_a_step(f"--data-size={self.data_size}", "give at least as many samples, or --num-batches")
        self._check_lookups_per_bag()
        if self.rand_data_min > self.rand_data_max:
            raise UsageError(f"--rand-data-min={self.rand_data_min:g} is above --rand-data-max={self.rand_data_max:g}")

    def _check_lookups_per_bag(self) -> None:
        given, tables = self.num_indices_per_lookup, len(self.arch_embedding_size)
        if len(given) not in (1, tables):
            raise UsageError(
                f"--num-indices-per-lookup has {len(given)} numbers, but --arch-embedding-size has {tables}; give one "
                "number for all tables, or one per table"
            )
        if max(self.samples_per_step, self.test_batch_size) * sum(self.lookups_per_bag) > INT32_MAX:
            raise UsageError(
                f"--mini-batch-size={self.mini_batch_size} and --num-indices-per-lookup={'-'.join(map(str, given))} "
                f"make more than {INT32_MAX} lookups in all tables"
            )

    def check_fills_a_step(self, samples: str, remedy: str) -> None:
        """Checks that an epoch has enough samples for a step.

        If not, raises a UsageError that names the samples as `samples` does and ends in `remedy`, what to do about it.
        """
        if 0 < self.num_batches < self.mlperf_grad_accum_iter:
            raise UsageError(
                f"--num-batches={self.num_batches} is less than --mlperf-grad-accum-iter={self.mlperf_grad_accum_iter}"
            )
        if self.batches_per_epoch == 0:
            raise UsageError(f"{samples} does not fill {self._step_in_words}; {remedy}")

    def _check_optimizer(self) -> None:
        if self.optimizer_settings and not self.optimizer_eps and not self.adagrad_initial_accumulator:
            raise UsageError(
                "--optimizer-eps=0 divides by zero where all gradients so far are zero; give a small number, or "
                "--adagrad-initial-accumulator"
            )

    def _check_learning_rate(self) -> None:
        """The warm-up must end before the decay begins, as in the reference script."""
        if self.lr_num_decay_steps and self.lr_decay_start_step < self.lr_num_warmup_steps:
            raise UsageError(
                f"--lr-decay-start-step={self.lr_decay_start_step} lies in the warm-up of --lr-num-warmup-steps="
                f"{self.lr_num_warmup_steps}; let the decay begin at step {self.lr_num_warmup_steps} or later"
            )

    def _check_checkpoints(self) -> None:
        if self.resume and not (self.load_model or self.save_model):
            raise UsageError("--resume needs --load-model or --save-model, the file to go on from")
        if self.resume and self.inference_only:
            raise UsageError("--resume goes on training; with --inference-only, give --load-model alone")
        if self.save_model and self.inference_only:
            raise UsageError("--save-model keeps what was trained; --inference-only trains nothing")
        if self.save_every and not self.save_model:
            raise UsageError("--save-every needs --save-model, the file to write")
        if self.load_model and not Path(self.load_model).exists():
            raise UsageError(f"--load-model: there is no file {self.load_model!r}")


# Flags that have an effect only where another flag has one of the values beside it.
NEEDED_VALUES = {
    ("data_generation", ("dataset",)): (
        "data_set", "raw_data_file", "processed_data_file", "data_randomize", "data_sub_sample_rate", "max_ind_range",
        "multi_hot_sizes", "multi_hot_distribution_type", "memory_map", "preprocess_memory", "on_bad_line",
        "mlperf_bin_loader", "mlperf_bin_shuffle", "num_workers", "test_num_workers",
    ),
    ("data_generation", ("random", "synthetic")): (
        "data_size", "num_indices_per_lookup", "num_indices_per_lookup_fixed", "round_targets",
    ),
    ("data_generation", ("random",)): (
        "rand_data_dist", "rand_data_alpha", "rand_data_min", "rand_data_max", "rand_data_mu", "rand_data_sigma",
    ),
    ("data_generation", ("synthetic",)): ("data_trace_file", "data_trace_enable_padding"),
    ("mlperf_bin_loader", (True,)): ("mlperf_bin_shuffle",),
    ("rand_data_dist", ("zipf",)): ("rand_data_alpha",),
    ("rand_data_dist", ("gaussian",)): ("rand_data_min", "rand_data_max", "rand_data_mu", "rand_data_sigma"),
    ("arch_interaction_op", ("dot",)): ("arch_interaction_itself",),
    ("arch_interaction_op", ("dcn",)): ("dcn_num_layers", "dcn_low_rank_dim"),
    ("loss_function", ("wbce",)): ("loss_weights",),
    ("optimizer", ("adagrad", "rwsadagrad")): ("optimizer_eps", "adagrad_initial_accumulator"),
    ("md_flag", (True,)): ("md_threshold", "md_temperature", "md_round_dims"),
    ("qr_flag", (True,)): ("qr_threshold", "qr_operation", "qr_collisions", "qr_init"),
}  # fmt: skip


def flags_without_effect(options: Options, given: Iterable[str]) -> list[str]:
    """Returns a line for each given field whose value the run does not use, because another flag rules it out."""
    lines = {}
    for (needed, values), names in NEEDED_VALUES.items():
        for name in given:
            if name in names and getattr(options, needed) not in values:
                remedy = " or ".join(flag(needed) if value is True else f"{flag(needed)}={value}" for value in values)
                lines.setdefault(name, f"{flag(name)} has no effect without {remedy}.")
    return list(lines.values())


# Flags of the reference script and the Habana fork that set another flag: name -> (field, value).
OLD_FLAGS = {
    "no_habana": ("device", "cpu"),
    "use_gpu": ("device", "cuda"),
    "run_lazy_mode": ("mode", "lazy"),
    "hmp": ("data_type", "bf16"),
}
KEEP_UNDERSCORE = ("data_type", "world_size", "local_rank")  # spelled with an underscore in the Habana fork


def flag(name: str) -> str:
    """Returns the canonical flag of a field, such as `--mini-batch-size` for `mini_batch_size`."""
    return "--" + (name if name in KEEP_UNDERSCORE else name.replace("_", "-"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = (  # of the trainer
    "python %(prog)s --num-batches=100 --mini-batch-size=128 --print-time",
    "python %(prog)s --num-batches=100 --device=cpu --optimizer=adagrad",
    "python %(prog)s --num-batches=100 --save-model=model.pt --resume",
)
ABOUT_ALL_FLAGS = (
    "A flag with [BOOL] is a switch: --allow-nan turns it on, --allow-nan=false turns it off. N-N-... are numbers "
    "joined by dashes, such as 13-512-16. Defaults are in square brackets. A help text that begins with a word such as "
    "Gaudi: or zipf: is about a flag that has an effect there only. --data-size may also be written --data_size."
)
ABOUT_OLD_FLAGS = "The flag --mode also takes custom, which means eager, and cpu, which means eager with --device=cpu."


class HelpFormatter(argparse.HelpFormatter):
    """Wraps texts to the width of the terminal, but never at the dash of a flag. A text of several lines keeps them."""

    def __init__(self, prog: str):
        width = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=width // 3, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines() if "\n" in text else self._split_lines(text, width)
        return "\n".join(indent + line for line in lines)


class OptionParser(argparse.ArgumentParser):
    """Reads the flags of dataclasses whose fields are made by `option`; by default, the flags of the trainer.

    What is wrong with a command line is a `UsageError`. `examples` are the command lines that --help shows; in them,
    `%(prog)s` stands for the program.
    """

    def __init__(
        self,
        *,
        declarations: Iterable[type] = (Options,),
        examples: Sequence[str] = EXAMPLES,
        add_help: bool = True,
        **settings: Any,
    ):
        super().__init__(
            usage="python %(prog)s [--flag=value ...]",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            **settings,
        )
        common = self.add_argument_group("the few flags that most runs need")
        self.add_argument_group("examples", "\n".join(examples))
        self.add_argument_group("all other flags", ABOUT_ALL_FLAGS)
        old_fields = []
        for field in itertools.chain.from_iterable(map(dataclasses.fields, declarations)):
            if field.metadata["group"]:
                group = self.add_argument_group(field.metadata["group"])
            if field.metadata["old"]:
                old_fields.append(field)
            else:
                _add_flag(common if field.metadata["common"] else group, field)
        if add_help:
            common.add_argument("-h", "--help", action="help", help="print this help, and exit")
        self.old_flags = self.add_argument_group("accepted for old command lines", ABOUT_OLD_FLAGS)
        for field in old_fields:
            _add_flag(self.old_flags, field)
        for name, (target, value) in OLD_FLAGS.items():
            meaning = f"the same as {flag(target)}={value}"
            self.old_flags.add_argument(flag(name), dest=target, action="store_const", const=value, help=meaning)

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Returns `{field: value}` of the flags in `argv`; raises UsageError."""
        given, unknown = self.parse_known_args([self._respelled(argument) for argument in argv])
        if unknown:
            raise UsageError(self._unknown(unknown[0]))
        return _without_cpu_mode(vars(given))

    def _respelled(self, argument: str) -> str:
        """Returns `--mini-batch-size=4` for `--mini_batch_size=4`, and `--data_type=bf16` for `--data-type=bf16`."""
        name, equals, value = argument.partition("=")
        known = flag(name.removeprefix("--").replace("-", "_"))
        return known + equals + value if known in self._option_string_actions else argument

    def _unknown(self, text: str) -> str:
        if not text.startswith("-"):
            return f"unexpected argument {text!r}"
        name = text.split("=")[0]
        nearest = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"unknown flag {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")

    def error(self, message: str) -> None:
        raise UsageError(re.sub(r"^argument \S*?(--[^/:]+)[^:]*", r"\1", message))


def _without_cpu_mode(given: dict[str, Any]) -> dict[str, Any]:
    """Replaces `--mode=cpu`, which the Habana fork has for eager mode on the CPU."""
    if given.get("mode") != "cpu":
        return given
    if given.get("device", "cpu") != "cpu":
        raise UsageError(f"--mode=cpu contradicts --device={given['device']}")
    return given | {"mode": "eager", "device": "cpu"}


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    details = field.metadata
    meaning = details["meaning"]
    if not details["available"]:
        meaning += " (not available yet)"
    takes_value = details["read"] is not None
    if takes_value and details["shown_default"] and not details["old"]:
        meaning += f" [{details['shown_default']}]"
    settings = {"type": details["read"], "metavar": details["placeholder"]} if takes_value else {"action": "store_true"}
    if details["read"] is boolean:
        settings |= {"nargs": "?", "const": True}
    names = *details["spellings"], flag(field.name)
    group.add_argument(*names, dest=field.name, help=meaning.replace("%", "%%"), **settings)


def to_argv(given: dict[str, Any]) -> list[str]:
    """Returns the command line that `parse_given` reads as `given`."""
    return [f"{flag(name)}={as_text(value)}" for name, value in given.items()]


def gaudi_environment(options: Options) -> dict[str, str]:
    """Returns the variables that the Gaudi plugin reads when it is imported, which may be as soon as torch is.

    PT_HPU_LAZY_MODE is 1 for lazy mode, and 0 for eager mode and torch.compile; its default depends on the plugin.
    PT_HPU_AUTOCAST_..._LIST name files of operators that autocast runs in bf16 and in fp32, instead of its own lists.
    """
    environment = {"PT_HPU_LAZY_MODE": "1" if options.mode == "lazy" else "0"}
    if options.data_type == "bf16":
        environment |= {
            "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": options.hmp_bf16,
            "PT_HPU_AUTOCAST_FP32_OPS_LIST": options.hmp_fp32,
        }
    return environment
