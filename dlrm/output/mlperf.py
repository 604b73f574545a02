"""The log that MLPerf's rules ask for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dlrm.options import Options
from dlrm.output.observer import print_failure
from dlrm.system.files import check_writable

FLAG = "--mlperf-logging"
NO_MLPERF_PACKAGE = f"{FLAG}: no :::MLLOG lines, as there is no package mlperf-logging; pip install mlperf-logging"


class MlperfLog:
    """Writes events as lines to stdout and to dlrm.log, by means of the package mlperf-logging.

    Raises UsageError if the file cannot be written. Writes nothing without `--mlperf-logging`, without that package, or
    on ranks other than 0. `notes` are lines for the user about what is missing.
    """

    def __init__(self, options: Options, rank: int = 0):
        self._logger = None
        self.notes: list[str] = []
        if not options.mlperf_logging or rank:
            return
        if importlib.util.find_spec("mlperf_logging") is None:
            self.notes.append(NO_MLPERF_PACKAGE)
            return
        from mlperf_logging import mllog

        path = Path(options.output_folder, "dlrm.log")
        check_writable(FLAG, path)
        mllog.config(filename=str(path))
        self._logger = mllog.get_mllogger()
        for handler in self._logger.logger.handlers:
            is_file = isinstance(handler, logging.FileHandler)
            handler.handleError = partial(self._leave_out, handler) if is_file else raise_again

    def _leave_out(self, handler: logging.Handler, _: logging.LogRecord) -> None:
        """Goes on without the file, which could not be written."""
        print_failure(FLAG, sys.exc_info()[1])
        self._logger.logger.removeHandler(handler)

    def event(self, metadata: dict | None = None, **values) -> None:
        """Logs one event for each keyword argument: its name is the event's key."""
        for key, value in values.items():
            if self._logger:
                self._logger.event(key=key, value=value, metadata=metadata)

    def start(self, period: str, **metadata) -> None:
        """Logs that a period, such as "epoch", begins."""
        if self._logger:
            self._logger.start(key=f"{period}_start", metadata=metadata)

    def stop(self, period: str, **metadata) -> None:
        """Logs that a period ends."""
        if self._logger:
            self._logger.end(key=f"{period}_stop", metadata=metadata)

    @contextlib.contextmanager
    def period(self, name: str, **metadata) -> Iterator[None]:
        """Logs the beginning and the end of the `with` block as a period. If the block fails, no end is logged."""
        self.start(name, **metadata)
        yield
        self.stop(name, **metadata)

    def describe(self, options: Options, test_samples: int) -> None:
        """Logs the settings that MLPerf's rules ask for: with cross layers, those of the benchmark dlrm_dcnv2 (training
        3.0 to 6.0), otherwise those of its predecessor dlrm (training 0.7 to 2.1). The submitter is the one that the
        reference script names."""
        dcn = options.arch_interaction_op == "dcn"
        submitter = ("org", "platform", "entry", "poc_name", "poc_email")
        self.event(
            submission_benchmark="dlrm_dcnv2" if dcn else "dlrm",
            submission_division="closed",
            submission_status="onprem",
            **{f"submission_{key}": "reference_implementation" for key in submitter},
            seed=options.numpy_rand_seed,
            global_batch_size=options.samples_per_step,
            train_samples=options.samples_per_epoch,
            eval_samples=test_samples,
            gradient_accumulation_steps=options.mlperf_grad_accum_iter,
            opt_name=options.optimizer,
            opt_base_learning_rate=options.learning_rate,
            opt_learning_rate_warmup_steps=options.lr_num_warmup_steps,
        )
        if dcn:
            self.describe_dcnv2(options)
        else:
            self.describe_dlrm(options)

    def describe_dcnv2(self, options: Options) -> None:
        """Logs what only the rules of dlrm_dcnv2 ask for."""
        self.event(
            opt_learning_rate_decay_start_step=options.lr_decay_start_step,
            opt_learning_rate_decay_steps=options.lr_num_decay_steps,
            opt_weight_decay=0,
        )
        if options.optimizer != "sgd":
            self.event(
                opt_adagrad_learning_rate_decay=0,
                opt_adagrad_initial_accumulator_value=options.adagrad_initial_accumulator,
                opt_adagrad_epsilon=options.optimizer_eps,
            )

    def describe_dlrm(self, options: Options) -> None:
        """Logs what only the rules of dlrm ask for."""
        self.event(
            lr_decay_start_steps=options.lr_decay_start_step,
            sgd_opt_base_learning_rate=options.learning_rate,
            sgd_opt_learning_rate_decay_steps=options.lr_num_decay_steps,
            sgd_opt_learning_rate_decay_poly_power=2,
        )
        bottom_layers = [f"bottom_mlp_dense{layer}" for layer in range(1, len(options.arch_mlp_bot))]
        top_layers = [f"top_mlp_dense{layer}" for layer in range(1, len(options.arch_mlp_top) + 1)]
        for tensor in ("embeddings", *bottom_layers, *top_layers):
            self.event({"tensor": tensor}, weights_initialization=None)


def raise_again(_: logging.LogRecord) -> None:
    """Lets an error of standard output end the run, as it would without a logger."""
    raise sys.exc_info()[1]
