"""Cross layers, against their formula in float64, and in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.dcn_model import DcnModel
from benchmarks.torchrec_losses import TOLERANCE, our_losses
from dlrm.data.data_set import open_data_set
from dlrm.devices.cpu import CpuBackend
from dlrm.kernels.cross import CrossLayer, CrossNet, FusedCrossNet
from dlrm.kernels.dense import FusedLayer, PlainLayer
from dlrm.options import Options
from dlrm_s_pytorch import Trainer, cross_values, draw_cross, select_backend

BATCH, WIDTH, RANK = 5, 12, 4
# What `python -m benchmarks.torchrec_losses --record` wrote with torchrec 1.8, fbgemm-gpu-cpu 1.8 and torch 2.13.
TORCHREC = json.loads(Path(__file__).with_name("reference_losses_torchrec.json").read_text())


def cross_net(kind, rank: int) -> CrossNet:
    """Returns two cross layers of random weights and biases, out of layers of the given kind."""
    torch.manual_seed(0)

    def cross() -> CrossLayer:
        down = kind(torch.randn(rank, WIDTH) / 4, None, relu=False) if rank else None
        return CrossLayer(down, kind(torch.randn(WIDTH, rank or WIDTH) / 4, torch.randn(WIDTH), relu=False))

    net = {PlainLayer: CrossNet, FusedLayer: FusedCrossNet}[kind]
    return net([cross(), cross()])


def formula(first: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """x0 * (W x + b) + x, layer by layer, where W is W V if there are three weights per layer."""
    per_layer, x = len(weights) // 2, first
    for layer in (0, 1):
        *factors, up, bias = weights[layer * per_layer : (layer + 1) * per_layer]
        matrix = up @ factors[0] if factors else up
        x = first * (x @ matrix.T + bias) + x
    return x


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("kind", [PlainLayer, FusedLayer])
def test_outputs_and_gradients_equal_the_formula_in_float64(kind, rank):
    net, first = cross_net(kind, rank), torch.randn(BATCH, WIDTH, requires_grad=True)
    layers = net.dense_layers()
    wide = [tensor.detach().double().requires_grad_() for layer in layers for tensor in layer.weights]
    wide_first = first.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(formula, (wide_first, *wide))  # the formula's, by finite differences
    output, expected = net(first), formula(wide_first, *wide)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(first.grad.double(), wide_first.grad, rtol=1e-4, atol=1e-3)
    gradients = [gradient.double() for layer in layers for gradient in layer.gradients]
    torch.testing.assert_close(gradients, [tensor.grad for tensor in wide], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
def test_a_run_trains_every_weight_of_the_cross_layers(data_type):
    options = Options(
        arch_interaction_op="dcn", dcn_num_layers=2, dcn_low_rank_dim=3, device="cpu", data_type=data_type,
        optimizer="adagrad", mini_batch_size=4, data_size=16,
    )  # fmt: skip
    trainer = Trainer(open_data_set(options), select_backend(options))
    parameters = dict(trainer.model.cross_l.named_parameters())
    names = ("down.weight", "up.weight", "up.bias")
    assert list(parameters) == [f"{layer}.{name}" for layer in (0, 1) for name in names]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trainer.train()
    assert not [name for name, parameter in parameters.items() if torch.equal(parameter, before[name])]


@pytest.mark.parametrize("recorded", TORCHREC, ids=lambda recorded: recorded["optimizer"])
def test_losses_equal_torchrecs_from_the_same_weights_and_batches(recorded):
    model = DcnModel(**{name: value for name, value in recorded.items() if name != "losses"})
    expected = np.array(recorded["losses"].split(), float)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(our_losses(model), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("rank", [0, 100])
def test_weights_start_as_xavier_normal(rank):
    width = 400
    drawn = draw_cross(np.random.RandomState(0), width, rank, select_backend(Options(device="cpu"))).state_dict()
    torch.manual_seed(0)
    for name, weight in drawn.items():
        if name == "up.bias":
            assert not weight.any()
            continue
        expected = nn.init.xavier_normal_(torch.empty_like(weight))
        torch.testing.assert_close(weight.mean(), expected.mean(), rtol=0, atol=1e-3)
        torch.testing.assert_close(weight.std(), expected.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(weight.abs().mean(), expected.abs().mean(), rtol=0.02, atol=0)


DCN = "--arch-interaction-op=dcn --device=cpu --num-batches=6 --optimizer=adagrad "


def test_the_report_counts_the_products_of_cross_layers(script, tmp_path):
    path = tmp_path / "report.json"
    flags = DCN + "--dcn-low-rank-dim=5 --dcn-num-layers=2 --arch-embedding-size=4-3-2 --arch-sparse-feature-size=2 "
    flags += f"--arch-mlp-bot=4-3-2 --arch-mlp-top=4-2-1 --mini-batch-size=4 --report={path}"
    assert script(flags)[0] == 0
    # Three times 2 * B * multiplications: bottom MLP 4*3 + 3*2, two cross layers of 2 * 8*5, top MLP 8*4 + 4*2 + 2*1.
    # The gradient of the first layer's input is not computed.
    flop = 1e9 * json.loads(path.read_text())["gflop_per_iteration"]
    assert flop == pytest.approx(3 * 2 * 4 * (18 + 160 + 42) - 2 * 4 * 12)


@pytest.mark.parametrize("rank", [0, RANK])
def test_the_memory_check_counts_what_a_backward_pass_of_cross_layers_needs(rank):
    net, kept = cross_net(FusedLayer, rank), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(BATCH, WIDTH, requires_grad=True))
    options = Options(arch_interaction_op="dcn", dcn_num_layers=2, dcn_low_rank_dim=rank)
    per_sample = sum(tensor.shape[1] for tensor in kept.values() if len(tensor) == BATCH)
    assert cross_values(options, WIDTH) == per_sample + 3 * WIDTH  # three gradients come in the backward pass


def test_a_batch_whose_values_of_cross_layers_do_not_fit_is_refused(script, monkeypatch):
    flags = DCN + "--arch-embedding-size=4-3 --arch-sparse-feature-size=8 --arch-mlp-bot=4-8 --arch-mlp-top=1 "
    flags += "--dcn-low-rank-dim=2 --mini-batch-size=1000 --num-indices-per-lookup=1"
    monkeypatch.setattr(CpuBackend, "memory_limit", lambda _: 1200_000)  # three layers need 4 * 1000 * 222 bytes
    assert script(flags)[0] == 0
    monkeypatch.setattr(CpuBackend, "memory_limit", lambda _: 888_000)
    status, _, errors = script(flags)
    assert status == 2
    assert "of it for the cross layers' values of a batch (--mini-batch-size), but cpu has" in errors
