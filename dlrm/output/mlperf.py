"""The log that MLPerf's rules ask for."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from dlrm.options import Options

NO_MLPERF_PACKAGE = (
    "--mlperf-logging: no :::MLLOG lines, as there is no package mlperf-logging; pip install mlperf-logging"
)


class MlperfLog:
    """Writes events as lines to stdout and to dlrm.log, by means of the package mlperf-logging.

    Writes nothing without `--mlperf-logging`, without that package, or on ranks other than 0. `notes` are lines for the
    user about what is missing.
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

        mllog.config(filename=str(Path(options.output_folder, "dlrm.log")))
        self._logger = mllog.get_mllogger()

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
        """Logs the settings that MLPerf's rules ask for. The submitter is the one that the reference script names."""
        submitter = ("org", "platform", "entry", "poc_name", "poc_email")
        self.event(
            submission_benchmark="dlrm",
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
            lr_decay_start_steps=options.lr_decay_start_step,
            sgd_opt_base_learning_rate=options.learning_rate,
            sgd_opt_learning_rate_decay_steps=options.lr_num_decay_steps,
            sgd_opt_learning_rate_decay_poly_power=2,
        )
        bottom_layers = [f"bottom_mlp_dense{layer}" for layer in range(1, len(options.arch_mlp_bot))]
        top_layers = [f"top_mlp_dense{layer}" for layer in range(1, len(options.arch_mlp_top) + 1)]
        for tensor in ("embeddings", *bottom_layers, *top_layers):
            self.event({"tensor": tensor}, weights_initialization=None)
