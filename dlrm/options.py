"""Every flag of the trainer, declared once.

`Options` holds one field per setting: its default, its meaning, and how its text is read. The command line of
`dlrm_s_pytorch.py`, the launcher `demo_dlrm.py` and the keys of `hb_configs/*.yaml` are all made from these fields, so
they cannot drift apart. Nothing here imports torch: the launcher answers at once, and the environment can be set
before torch, and a Gaudi plugin that loads itself with torch, come in.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.errors import UsageError

OP_LISTS = Path(__file__).resolve().parent.parent / "hb_configs"
INT32_MAX = 2**31 - 1  # lookups travel as int32, the index type of the Gaudi kernels


# ---------------------------------------------------------------------------------------------------------------------
# Readers: from the text of a flag to its value, with an error that says what would be right
# ---------------------------------------------------------------------------------------------------------------------


def _expected(what: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {what}, got {text!r}")


def integer(minimum: int | None = None, maximum: int = 2**63 - 1) -> Callable[[str], int]:
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


def byte_count(text: str) -> int:
    """`"4G"` -> 4 * 2**30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise _expected("a size in bytes, such as 512M or 4G", text)
    return int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " ")))


def sizes(text: str) -> tuple[int, ...]:
    """`"13-512-16"` -> `(13, 512, 16)`."""
    try:
        values = tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise _expected("positive integers joined by dashes such as 13-512-16", text) from None
    for value in values:
        if not 1 <= value <= INT32_MAX:
            raise _expected(f"every size from 1 to {INT32_MAX}", text)
    return values


def class_weights(text: str) -> tuple[float, float]:
    """`"0.3-1.7"` -> `(0.3, 1.7)`; the dash of an exponent, as in 1e-5, does not separate."""
    try:
        negative, positive = (number(minimum=0)(part) for part in re.split(r"(?<![eE])-", text))
    except (ValueError, argparse.ArgumentTypeError):
        raise _expected("two numbers of at least 0 joined by a dash, for class 0 and class 1", text) from None
    return negative, positive


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise _expected("true or false", text)
    return values[text.lower()]


def one_of(*choices: str, **old_names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        value = old_names.get(text, text)
        if value not in choices:
            raise _expected(f"one of {', '.join(choices)}", text)
        return value

    return read


# ---------------------------------------------------------------------------------------------------------------------
# The flags
# ---------------------------------------------------------------------------------------------------------------------


def option(
    default: Any,
    meaning: str,
    read: Callable[[str], Any] = str,
    *,
    group: str | None = None,
    spellings: Sequence[str] = (),
    available: bool = True,
) -> Any:
    """A field of `Options`.

    `group` opens a new section of --help; fields below belong to it until the next one. `spellings` are further names
    of the flag. An option that is not `available` is known by name, but refused when set.
    """
    details = {"meaning": meaning, "read": read, "group": group, "spellings": spellings, "available": available}
    return dataclasses.field(default=default, metadata=details)


@dataclass(frozen=True)
class Options:
    """All settings of a run. Field `mini_batch_size` is flag `--mini-batch-size`; `--mini_batch_size` works as well."""

    # fmt: off
    device: str = option("auto", "auto (a Gaudi if there is one, else the CPU), cpu, hpu or cuda",
                         one_of("auto", "cpu", "hpu", "cuda"), group="where and how to run")
    mode: str = option("eager", "eager, lazy or compile; lazy equals eager where there is no Gaudi",
                       one_of("eager", "lazy", "compile", "cpu", custom="eager"))
    data_type: str = option("fp32", "fp32, or bf16 for the MLPs and the interaction",
                            one_of("fp32", "bf16"), spellings=("-d",))
    world_size: int = option(1, "number of devices, each with a rank of its own", integer(1), spellings=("-w",))
    numpy_rand_seed: int = option(123, "seed of weights and random data", integer(0, 2**32 - 1))
    hmp_bf16: str = option(str(OP_LISTS / "ops_bf16_dlrm.txt"), "Gaudi: file of ops that run in bf16, one a line")
    hmp_fp32: str = option(str(OP_LISTS / "ops_fp32_dlrm.txt"), "Gaudi: file of ops that stay in fp32, one a line")
    hmp_opt_level: str = option("O1", "accepted for old command lines; autocast has no levels")
    hmp_verbose: bool = option(False, "accepted for old command lines; autocast has no such output", boolean)
    gemm: str = option("auto", "CPU: products of fp32 layers by torch's default, by oneDNN, or by the faster, "
                       "timed once for each large layer", one_of("auto", "default", "onednn"))
    lookup_preprocessing: str = option("own", "Gaudi: group lookups by our own op, or by the plugin's",
                                       one_of("own", "plugin"))
    hpu_graphs: bool = option(False, "Gaudi, lazy mode: record a training step once, then replay it", boolean)
    local_rank: int = option(-1, "accepted for old command lines; the launcher's variables say it", integer(-1))
    distributed: bool = option(False, "insist on being one of several ranks, started by a launcher", boolean)
    dist_backend: str = option("", "of torch.distributed, for the device; gloo on a CPU, hccl, nccl")
    dist_timeout: int = option(300, "seconds after which a rank that does not answer ends the run", integer(1, 10**6))
    sharding: str = option("auto", "table, row, column (cuts all tables), or auto: cut rows where tables are too large "
                           "or too few", one_of("auto", "table", "row", "column"))
    print_plan: bool = option(False, "print which rank holds what, and end", boolean)
    sync_dense_params: bool = option(True, "accepted for old command lines; MLP replicas are always in step", boolean)

    arch_sparse_feature_size: int = option(2, "embedding dimension D, equal to the bottom MLP's last width",
                                           integer(1, INT32_MAX), group="model")
    arch_embedding_size: tuple[int, ...] = option((4, 3, 2), "rows of each table, joined by dashes", sizes)
    arch_mlp_bot: tuple[int, ...] = option((4, 3, 2), "widths of the bottom MLP; the first is the number of dense "
                                           "features", sizes)
    arch_mlp_top: tuple[int, ...] = option((4, 2, 1), "widths of the top MLP, the last is 1; the interaction's width "
                                           "is put in front", sizes)
    arch_interaction_op: str = option("dot", "dot (pairwise dot products) or cat (concatenation)", one_of("dot", "cat"))
    arch_interaction_itself: bool = option(False, "dot: each feature with itself, too", boolean)
    table_data_type: str = option("fp32", "of table rows: fp32; or bf16, rounded at random so that small steps add up",
                                  one_of("fp32", "bf16"))
    activation_function: str = option("relu", "of every layer but the last, which ends in a sigmoid", one_of("relu"))
    loss_function: str = option("bce", "mse, bce or wbce (bce with a weight for each class)",
                                one_of("mse", "bce", "wbce"))
    loss_weights: tuple[float, float] = option((1.0, 1.0), "wbce: weight of class 0 and of class 1", class_weights)
    loss_threshold: float = option(0.0, "t > 0 clamps predictions to [t, 1-t]", number(0, 0.5))
    weighted_pooling: str = option("", "fixed (all 1) or learned weights of rows in a bag", one_of("fixed", "learned"))
    md_flag: bool = option(False, "mixed-dimension tables", boolean)
    md_threshold: int = option(200, "rows above which a table is mixed-dimension", integer(0))
    md_temperature: float = option(0.3, "mixed dimension: how much shorter rows are in tables of more rows", number(0))
    md_round_dims: bool = option(False, "mixed dimension: round to powers of two", boolean)
    qr_flag: bool = option(False, "quotient-remainder tables", boolean)
    qr_threshold: int = option(200, "rows above which a table is quotient-remainder", integer(0))
    qr_operation: str = option("mult", "quotient-remainder: mult, add or concat; concat gives twice "
                               "--arch-sparse-feature-size", one_of("mult", "add", "concat"))
    qr_collisions: int = option(4, "quotient-remainder: number of collisions", integer(1, INT32_MAX))
    qr_init: str = option("even", "quotient-remainder: even (variance of an ordinary table) or public (the public "
                          "script's, all positive)", one_of("even", "public"))

    data_generation: str = option("random", "source of the data: random, synthetic (after a trace) or dataset",
                                  one_of("random", "synthetic", "dataset", "internal"), group="data")
    data_size: int = option(8, "samples of an epoch", integer(1))
    num_batches: int = option(0, "batches of an epoch; 0 leaves it to --data-size", integer(0))
    num_indices_per_lookup: int = option(10, "lookups of a bag, at most", integer(1, INT32_MAX))
    num_indices_per_lookup_fixed: bool = option(False, "draw exactly that many (equal ones count once)", boolean)
    round_targets: bool = option(False, "random targets are 0 or 1 instead of between", boolean)
    rand_data_dist: str = option("uniform", "of random lookups: uniform, gaussian or zipf",
                                 one_of("uniform", "gaussian", "zipf"))
    rand_data_alpha: float = option(1.05, "zipf: row r is looked up as (r + 1) ** -alpha, about", number(0))
    rand_data_min: float = option(0.0, "gaussian: smallest row", number())
    rand_data_max: float = option(1.0, "gaussian: largest row", number())
    rand_data_mu: float = option(-1.0, "gaussian: mean row; -1 is the middle of smallest and largest", number())
    rand_data_sigma: float = option(1.0, "gaussian: standard deviation", number(0))
    num_workers: int = option(0, "threads that read a data set ahead; random data is one stream and needs none",
                              integer(0))
    data_trace_file: str = option("./input/dist_emb_j.log", "synthetic: distribution of stack distances; a j in the "
                                  "file's name stands for the table's number")
    data_trace_enable_padding: bool = option(False, "synthetic: once all rows have been seen, draw no new ones",
                                             boolean)
    data_set: str = option("kaggle", "kaggle or terabyte", one_of("kaggle", "terabyte"))
    raw_data_file: str = option("", "text of a data set; kaggle: the file, terabyte: the files' names without _0, _1, "
                                "...")
    processed_data_file: str = option("", "folder of preprocessed data, or a file of the public script (.npz)")
    data_randomize: str = option("total", "shuffle training samples: total, day (each day on its own) or none",
                                 one_of("total", "day", "none"))
    data_sub_sample_rate: float = option(0.0, "share of negative samples that preprocessing drops", number(0, 1))
    max_ind_range: int = option(-1, "category ids are taken modulo this, which caps table rows; -1 for no cap",
                                integer(-1, INT32_MAX))
    memory_map: bool = option(False, "read the public script's *_reordered.npz, a day at a time", boolean)
    dataset_multiprocessing: bool = option(False, "accepted for old command lines; preprocessing is parallel", boolean)
    preprocess_memory: int = option(4 * 2**30, "memory for preprocessing, and for the order of samples", byte_count)
    on_bad_line: str = option("error", "malformed lines of text: error (end) or skip (leave out and count)",
                              one_of("error", "skip"))
    mlperf_bin_loader: bool = option(False, "read MLPerf's binary files; written from the data set if missing", boolean)
    mlperf_bin_shuffle: bool = option(False, "shuffle MLPerf's binary files, by whole batches", boolean)

    mini_batch_size: int = option(1, "samples of a batch", integer(1, INT32_MAX), group="training", spellings=("-b",))
    nepochs: int = option(1, "epochs", integer(1))
    learning_rate: float = option(0.01, "learning rate", number(0))
    optimizer: str = option("sgd", "sgd, adagrad, or rwsadagrad: Adagrad with one moment for a row of a table",
                            one_of("sgd", "adagrad", "rwsadagrad"))
    measure_perf: bool = option(False, "train on the first batch again and again, so that data costs no time",
                                boolean)
    allow_nan: bool = option(False, "go on when the loss is not finite", boolean)
    lr_num_warmup_steps: int = option(0, "optimizer steps in which the learning rate grows to --learning-rate",
                                      integer(0))
    lr_decay_start_step: int = option(0, "step from which it falls, quadratically", integer(0))
    lr_num_decay_steps: int = option(0, "steps in which it falls; 0 for never", integer(0))
    mlperf_grad_accum_iter: int = option(1, "batches to an optimizer step, of which it takes the mean gradient",
                                         integer(1))

    inference_only: bool = option(False, "no training: forward passes over the test data", boolean, group="evaluation")
    test_freq: int = option(-1, "iterations between tests; the last of an epoch tests, too; -1 for none", integer(-1))
    test_mini_batch_size: int = option(-1, "samples of a test batch; -1 for --mini-batch-size", integer(-1, INT32_MAX))
    test_num_workers: int = option(-1, "--num-workers of tests; -1 for the same", integer(-1))
    quantize_mlp_with_bit: int = option(32, "bits of MLP weights in inference", integer(8, 32), available=False)
    quantize_emb_with_bit: int = option(32, "bits of tables in inference", integer(4, 32), available=False)
    mlperf_logging: bool = option(False, "more metrics of tests, and MLPerf's log lines", boolean)
    mlperf_acc_threshold: float = option(0.0, "stop when a test reaches this accuracy, of 1; 0 for never", number(0))
    mlperf_auc_threshold: float = option(0.0, "stop when a test reaches this AUC; 0 for never", number(0))

    print_freq: int = option(1, "iterations between printed lines", integer(1), group="output")
    print_time: bool = option(False, "measure ms/it, and print a report at the end", boolean)
    print_wall_time: bool = option(False, "end each line in the time of day", boolean)
    print_precision: int = option(5, "digits of printed tensors", integer(0, 17))
    report: str = option("", "write the report to this file as JSON")
    debug_mode: bool = option(False, "print architecture, data and parameters", boolean)
    log_device_mem_alloc: bool = option(False, "print the memory in use below each line", boolean)
    print_all_ranks: bool = option(False, "let every rank print", boolean)
    print_dist_loss: bool = option(False, "print the loss over all ranks once more, below each line", boolean)
    output_folder: str = option(".", "folder of the files whose names are fixed: dlrm_s_pytorch.json and so on")
    enable_profiling: bool = option(False, "write a trace, dlrm_s_pytorch.json, and tables, dlrm_s_pytorch.prof",
                                    boolean)
    plot_compute_graph: bool = option(False, "draw the model to dlrm_s_pytorch_graph.dot, with Graphviz to .svg",
                                       boolean)
    tensor_board_filename: str = option("", "write TensorBoard logs to this folder")
    plot: str = option("", "draw loss, accuracy and ms/it to this .png, .svg or .pdf file")
    save_model: str = option("", "write a checkpoint to this file, with several ranks a folder, at the end, and at "
                             "SIGTERM or Ctrl-C")
    save_every: int = option(0, "iterations between checkpoints; 0 for none before the end", integer(0))
    load_model: str = option("", "start from the weights of this checkpoint")
    resume: bool = option(False, "go on where the checkpoint of --load-model, else of --save-model, was written",
                          boolean)
    save_onnx: bool = option(False, "export the trained model to dlrm_s_pytorch.onnx", boolean)
    # fmt: on

    def __post_init__(self) -> None:
        self._check_available()
        self._check_model()
        self._check_data()
        self._check_checkpoints()

    @property
    def batches_per_epoch(self) -> int:
        """Batches of full steps; samples that do not fill a step are left out."""
        return self._samples // self.samples_per_step * self.mlperf_grad_accum_iter

    @property
    def samples_per_step(self) -> int:
        """Of an optimizer step."""
        return self.mini_batch_size * self.mlperf_grad_accum_iter

    @property
    def samples_per_epoch(self) -> int:
        return self.batches_per_epoch * self.mini_batch_size

    @property
    def embedding_dim(self) -> int:
        """Numbers that a table gives for a bag, D."""
        return self.arch_sparse_feature_size * (2 if self.qr_flag and self.qr_operation == "concat" else 1)

    @property
    def special_tables(self) -> str:
        """The flag that asks for tables in plain torch; empty where none does."""
        flags = {"qr_flag": self.qr_flag, "md_flag": self.md_flag, "weighted_pooling": self.weighted_pooling}
        return next((flag(name) for name, given in flags.items() if given), "")

    @property
    def discarded_samples(self) -> int:
        return self._samples - self.samples_per_epoch

    @property
    def test_batch_size(self) -> int:
        return self.test_mini_batch_size if self.test_mini_batch_size > 0 else self.mini_batch_size

    @property
    def _what_is_filled(self) -> str:
        if self.mlperf_grad_accum_iter == 1:
            return f"a batch of --mini-batch-size={self.mini_batch_size}"
        return (
            f"--mlperf-grad-accum-iter={self.mlperf_grad_accum_iter} batches of --mini-batch-size="
            f"{self.mini_batch_size}"
        )

    @property
    def _samples(self) -> int:
        asked = self.num_batches * self.mini_batch_size
        if self.data_generation == "dataset":  # there are no more than that
            return min(asked, self.data_size) or self.data_size
        return asked or self.data_size

    def _check_available(self) -> None:
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
        for field in dataclasses.fields(self):
            if not field.metadata["available"] and getattr(self, field.name) != field.default:
                raise UsageError(f"{flag(field.name)} is not available yet")

    def _check_works_on_several_ranks(self) -> None:
        alone = ("save_onnx", "plot_compute_graph", "hpu_graphs")
        given = [name for name in alone if getattr(self, name)]
        if given:
            raise UsageError(f"{flag(given[0])} works on one device alone so far; use --world_size=1")
        if self.special_tables:
            raise UsageError(f"{self.special_tables}: such tables can't be split over ranks; use --world_size=1")

    def _check_data_files(self) -> None:
        """Whether what is given exists; what can be made from the other file need not."""
        raw, processed = self.raw_data_file, self.processed_data_file
        if not raw and not processed:
            raise UsageError("--data-generation=dataset needs --raw-data-file or --processed-data-file")
        # Beside the text may be what was preprocessed from it, and the text gone.
        if raw and not processed and not any(Path(raw).parent.glob(glob.escape(Path(raw).name.split(".")[0]) + "*")):
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
            self._check_data_files()  # they say how many samples there are
        else:
            self.check_fills_a_step(f"--data-size={self.data_size}", "give at least as many samples, or --num-batches")
        if max(self.samples_per_step, self.test_batch_size) * self.num_indices_per_lookup > INT32_MAX:
            raise UsageError(
                f"--mini-batch-size={self.mini_batch_size} x --num-indices-per-lookup={self.num_indices_per_lookup} "
                f"is more than {INT32_MAX} lookups in a table"
            )
        if self.rand_data_min > self.rand_data_max:
            raise UsageError(f"--rand-data-min={self.rand_data_min:g} is above --rand-data-max={self.rand_data_max:g}")

    def check_fills_a_step(self, samples: str, remedy: str) -> None:
        """UsageError, which names the samples so and says what to do, if an epoch has not enough of them."""
        if 0 < self.num_batches < self.mlperf_grad_accum_iter:
            raise UsageError(
                f"--num-batches={self.num_batches} is less than --mlperf-grad-accum-iter={self.mlperf_grad_accum_iter}"
            )
        if self.batches_per_epoch == 0:
            raise UsageError(f"{samples} does not fill {self._what_is_filled}; {remedy}")

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


# Flags of the ancestors that set another flag: name -> (field, value).
OLD_FLAGS = {
    "no_habana": ("device", "cpu"),
    "use_gpu": ("device", "cuda"),
    "run_lazy_mode": ("mode", "lazy"),
    "hmp": ("data_type", "bf16"),
}
KEEP_UNDERSCORE = ("data_type", "world_size", "local_rank")  # spelled with an underscore since the first launcher


def flag(name: str) -> str:
    """The canonical flag of a field: `mini_batch_size` -> `--mini-batch-size`."""
    return "--" + (name if name in KEEP_UNDERSCORE else name.replace("_", "-"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


class OptionParser(argparse.ArgumentParser):
    """Reads flags into a namespace that holds just those which were given; errors are a `UsageError`."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **settings)
        for field in dataclasses.fields(Options):
            if field.metadata["group"]:
                section = self.add_argument_group(field.metadata["group"])
            _add_option(section, field)
        section = self.add_argument_group("old names")
        for name, (target, value) in OLD_FLAGS.items():
            section.add_argument(
                flag(name),
                dest=target,
                action="store_const",
                const=value,
                help=f"same as {flag(target)}={value}",
            )

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """`{field: value}` of the flags in `argv`; raises UsageError."""
        given, unknown = self.parse_known_args([self._respelled(argument) for argument in argv])
        if unknown:
            raise UsageError(self._unknown(unknown[0]))
        return _without_cpu_mode(vars(given))

    def _respelled(self, argument: str) -> str:
        """`--mini_batch_size=4` -> `--mini-batch-size=4`, `--data-type=bf16` -> `--data_type=bf16`."""
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
    """`--mode cpu` is the old launcher's name for eager mode on the CPU."""
    if given.get("mode") != "cpu":
        return given
    if given.get("device", "cpu") != "cpu":
        raise UsageError(f"--mode=cpu contradicts --device={given['device']}")
    return given | {"mode": "eager", "device": "cpu"}


def _add_option(section: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    details = field.metadata
    settings = {"dest": field.name, "type": details["read"], "metavar": field.name.split("_")[-1].upper()}
    if details["read"] is boolean:
        settings |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    meaning = details["meaning"] if details["available"] else details["meaning"] + " (not available yet)"
    meaning += f" [{as_text(field.default)}]" if as_text(field.default) else ""
    section.add_argument(*details["spellings"], flag(field.name), help=meaning.replace("%", "%%"), **settings)


def as_text(value: Any) -> str:
    """The text that a flag reads back as `value`: `(13, 512, 16)` -> `"13-512-16"`."""
    return "-".join(map(as_text, value)) if isinstance(value, tuple) else str(value)


def to_argv(given: dict[str, Any]) -> list[str]:
    """The command line that `parse_given` reads as `given`."""
    return [f"{flag(name)}={as_text(value)}" for name, value in given.items()]


def gaudi_environment(options: Options) -> dict[str, str]:
    """Variables that the Gaudi plugin reads once, when it is imported; which may be as soon as torch is.

    PT_HPU_LAZY_MODE: 1 is lazy mode, 0 is eager mode, and with it torch.compile. Plugins differ in the default.
    PT_HPU_AUTOCAST_..._LIST: files of operators that autocast runs in bf16 and in fp32, in place of its own lists.
    """
    environment = {"PT_HPU_LAZY_MODE": "1" if options.mode == "lazy" else "0"}
    if options.data_type == "bf16":
        environment |= {
            "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": options.hmp_bf16,
            "PT_HPU_AUTOCAST_FP32_OPS_LIST": options.hmp_fp32,
        }
    return environment
