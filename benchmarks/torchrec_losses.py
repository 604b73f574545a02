"""Losses of our training beside those of torchrec's `DLRM_DCN`, from the same weights and batches.

python -m benchmarks.torchrec_losses --torchrec-python PYTHON                  prints how much they differ
python -m benchmarks.torchrec_losses --torchrec-python PYTHON --record FILE    also writes torchrec's, for the tests

PYTHON is a Python that has torchrec and fbgemm-gpu-cpu. Exits with status 1 if a loss differs by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from benchmarks.dcn_model import DcnModel, NumpyBatch, Weights, draw_batches, draw_weights
from benchmarks.peer_process import PeerProcess, check_python
from dlrm.batch import Batch
from dlrm.data.data_set import open_data_set
from dlrm.options import Options
from dlrm_s_pytorch import DLRM_Net, Trainer, select_backend

FLAG = "--torchrec-python"
STEPS = Path(__file__).with_name("torchrec_step.py")
ITERATIONS = 50
TOLERANCE = 2e-6  # relative; the losses move by 2e-7 when each weight is off by one rounding at the start
SIZES = {
    "table_rows": [50, 7, 3, 200, 20],
    "lookups": [3, 2, 1, 7, 12],
    "dim": 16,
    "bottom": [13, 32, 16],
    "top": [64, 32, 1],
    "cross_layers": 3,
    "cross_rank": 8,
    "batch": 32,
    "eps": 1e-8,
}
# Adagrad's first steps have the size of the learning rate, whatever the gradient: with one of 0.02, sums that are taken
# in another order end in losses that differ by 1e-3.
MODELS = [
    DcnModel(**SIZES, optimizer="sgd", learning_rate=0.05),
    DcnModel(**SIZES, optimizer="adagrad", learning_rate=0.005),
    DcnModel(**SIZES, optimizer="rwsadagrad", learning_rate=0.005),
]


def check_torchrec(python: str) -> None:
    """Raises UsageError if `python` is no Python that has torchrec."""
    check_python(FLAG, python, "torchrec, fbgemm_gpu", "torchrec and fbgemm-gpu-cpu")


def torchrec_losses(python: str, model: DcnModel) -> list[float]:
    with torchrec_process(python, model, ITERATIONS, "drawn") as peer:
        return [float(peer.step()) for _ in range(ITERATIONS)]


def torchrec_process(python: str, model: DcnModel, batches: int, weights: str) -> PeerProcess:
    """Returns a process that trains the model by torchrec, a batch per step, and repeats after so many batches. The
    arguments are those of `torchrec_step.py`."""
    return PeerProcess(FLAG, [python, str(STEPS), json.dumps(dataclasses.asdict(model)), str(batches), weights])


def our_losses(model: DcnModel) -> list[float]:
    """Trains the model by this project's code."""
    options = options_of(model)
    trainer = Trainer(open_data_set(options), select_backend(options))
    load(trainer.model, draw_weights(model))
    batches = map(on_torch, draw_batches(model, ITERATIONS))
    return [trainer.train_step(batch)[0].item() for batch in trainer.prepared(batches)]


def options_of(model: DcnModel) -> Options:
    return Options(
        device="cpu",
        arch_interaction_op="dcn",
        arch_embedding_size=tuple(model.table_rows),
        arch_sparse_feature_size=model.dim,
        arch_mlp_bot=tuple(model.bottom),
        arch_mlp_top=tuple(model.top),
        dcn_num_layers=model.cross_layers,
        dcn_low_rank_dim=model.cross_rank,
        num_indices_per_lookup=tuple(model.lookups),
        loss_function="bce",
        mini_batch_size=model.batch,
        num_batches=ITERATIONS,
        optimizer=model.optimizer,
        learning_rate=model.learning_rate,
        optimizer_eps=model.eps,
    )


@torch.no_grad()
def load(network: DLRM_Net, weights: Weights) -> None:
    """Copies weights into a network in fp32."""
    parts = network.emb_l, network.bot_l, network.cross_l, network.top_l
    for part, arrays in zip(parts, weights, strict=True):
        for tensor, array in zip(part.state_dict().values(), arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))


def on_torch(batch: NumpyBatch) -> Batch:
    offsets = [torch.arange(len(bags) + 1) * bags.shape[1] for bags in batch.indices]
    indices = [torch.from_numpy(bags.ravel()) for bags in batch.indices]
    return Batch(torch.from_numpy(batch.dense), indices, torch.stack(offsets), torch.from_numpy(batch.target))


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Returns the largest relative difference."""
    return max(abs(our / their - 1) for our, their in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchrec_losses", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torchrec-python", metavar="PYTHON", required=True, help="a Python that has torchrec and fbgemm-gpu-cpu"
    )
    parser.add_argument("--record", metavar="FILE", help="write torchrec's losses to this file as well")
    arguments = parser.parse_args()
    check_torchrec(arguments.torchrec_python)
    lines, differences = [], []
    for model in MODELS:
        theirs = torchrec_losses(arguments.torchrec_python, model)
        difference = largest_difference(our_losses(model), theirs)
        differences.append(difference)
        lines.append(json.dumps(dataclasses.asdict(model) | {"losses": " ".join(f"{loss:.9g}" for loss in theirs)}))
        print(
            f"{model.optimizer:11} loss {theirs[0]:.6f} to {theirs[-1]:.6f}, differs by {differences[-1]:.1e} at most"
        )
    if arguments.record:
        Path(arguments.record).write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return int(not max(differences) <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
