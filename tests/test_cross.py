"""Cross layers, against their formula in float64, and in whole runs."""

from __future__ import annotations

import pytest
import torch

from dlrm.data.data_set import open_data_set
from dlrm.kernels.cross import CrossLayer, CrossNet
from dlrm.kernels.dense import FusedLayer, PlainLayer
from dlrm.options import Options
from dlrm_s_pytorch import Trainer, select_backend

BATCH, WIDTH, RANK = 5, 12, 4


def cross_net(kind, rank: int) -> CrossNet:
    """Returns two cross layers of random weights and biases, out of layers of the given kind."""
    torch.manual_seed(0)

    def cross() -> CrossLayer:
        down = kind(torch.randn(rank, WIDTH) / 4, None, relu=False) if rank else None
        return CrossLayer(down, kind(torch.randn(WIDTH, rank or WIDTH) / 4, torch.randn(WIDTH), relu=False))

    return CrossNet([cross(), cross()])


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
