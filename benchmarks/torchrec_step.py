"""A process that does a training step of torchrec's `DLRM_DCN` for each line that it reads, and prints the loss.

python torchrec_step.py MODEL BATCHES WEIGHTS

MODEL is a `DcnModel` of `dcn_model.py` in JSON. BATCHES is the number of batches, after which the first one comes
again. WEIGHTS is "drawn" for those of `draw_weights`, or "own" for those with which torchrec begins. The tables are
fbgemm's, whose backward pass updates them. The process prints "ready" before it reads the first line. It runs in a
Python that has torch, torchrec and fbgemm-gpu-cpu, and needs nothing of this project but `dcn_model.py`, beside it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from dcn_model import DcnModel, NumpyBatch, Weights, draw_batches, draw_weights
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

TABLE_OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rwsadagrad": RowWiseAdagrad}


def main(text: str, num_batches: str, weights: str) -> None:
    model = DcnModel(**json.loads(text))
    network = new_network(model)
    if weights == "drawn":
        load(network, draw_weights(model))
    optimizer = dense_optimizer(model, network)
    step = DLRMTrain(network)
    batches = [on_torch(batch) for batch in draw_batches(model, int(num_batches))]
    print("ready", flush=True)
    for _, batch in zip(sys.stdin, itertools.cycle(batches), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model.data_type == "bf16"):
            loss, _ = step(batch)
        loss.backward()
        optimizer.step()
        print(loss.item(), flush=True)


def new_network(model: DcnModel) -> DLRM_DCN:
    names = [f"table_{number}" for number in range(len(model.table_rows))]
    tables = FusedEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(num_embeddings=rows, embedding_dim=model.dim, name=name, feature_names=[name])
            for name, rows in zip(names, model.table_rows, strict=True)
        ],
        optimizer_type=TABLE_OPTIMIZERS[model.optimizer],
        optimizer_kwargs=optimizer_settings(model),
    )
    return DLRM_DCN(
        tables,
        dense_in_features=model.bottom[0],
        dense_arch_layer_sizes=model.bottom[1:],
        over_arch_layer_sizes=model.top,
        dcn_num_layers=model.cross_layers,
        dcn_low_rank_dim=model.cross_rank,
    )


def optimizer_settings(model: DcnModel) -> dict[str, float]:
    return {"lr": model.learning_rate} | ({} if model.optimizer == "sgd" else {"eps": model.eps})


def dense_optimizer(model: DcnModel, network: DLRM_DCN) -> torch.optim.Optimizer:
    kind = torch.optim.SGD if model.optimizer == "sgd" else torch.optim.Adagrad
    return kind([tensor for part in dense_parts(network) for tensor in part], **optimizer_settings(model))


@torch.no_grad()
def load(network: DLRM_DCN, weights: Weights) -> None:
    bags = network.sparse_arch.embedding_bag_collection.embedding_bags.values()
    for parts, arrays in zip([[bag.weight for bag in bags], *dense_parts(network)], weights, strict=True):
        for tensor, array in zip(parts, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))


def dense_parts(network: DLRM_DCN) -> Iterator[list[Tensor]]:
    """Yields the weights of the bottom MLP, of the cross layers and of the top MLP, in the order of `Weights`."""
    cross = network.inter_arch.crossnet
    yield list(network.dense_arch.parameters())
    yield list(itertools.chain(*zip(cross.V_kernels, cross.W_kernels, cross.bias, strict=True)))
    yield list(network.over_arch.parameters())


def on_torch(batch: NumpyBatch) -> Batch:
    lookups = KeyedJaggedTensor(
        keys=[f"table_{number}" for number in range(len(batch.indices))],
        values=torch.from_numpy(np.concatenate([bags.ravel() for bags in batch.indices])),
        lengths=torch.from_numpy(np.concatenate([np.full(len(bags), bags.shape[1]) for bags in batch.indices])),
    )
    return Batch(torch.from_numpy(batch.dense), lookups, torch.from_numpy(batch.target.ravel()))


if __name__ == "__main__":
    main(*sys.argv[1:])
