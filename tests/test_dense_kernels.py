"""The dense ops against torch's optimizers and float64: C++ kernels where they were built, references elsewhere."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dlrm.kernels import ops as reference
from dlrm.kernels.dense import ForeachAdagrad, FusedDenseAdagrad, FusedDenseSGD, FusedLayer, FusedLinear, PlainLayer
from dlrm.kernels.gemm import PRODUCTS, bf16_products

ops = torch.ops.dlrm
EPS = 1e-10
HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("dlrm::dot_interaction", "CPU")

sizes = st.integers(1, 70)
types = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(params=["op", "reference"])
def dot_interaction(request):
    return ops.dot_interaction if request.param == "op" else reference.dot_interaction_reference


def random_parameters(seed: int, shapes: list[tuple[int, ...]], grad_type: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator).to(grad_type) for shape in shapes]
    return weights, grads


shapes = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=5)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), shapes=shapes, grad_type=types, with_shadows=st.booleans(), rule=st.sampled_from(
    ["adagrad", "sgd"]))  # fmt: skip
def test_optimizers_equal_torchs(seed, shapes, grad_type, with_shadows, rule):
    weights, grads = random_parameters(seed, shapes, grad_type)
    theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
    moments = [torch.zeros_like(weight) for weight in weights]
    shadows = [torch.full_like(weight, torch.nan, dtype=torch.bfloat16) for weight in weights] if with_shadows else []
    optimizer = {"adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}[rule](theirs, lr=0.1)
    for step in range(3):
        grads = [grad * (step + 1) for grad in grads]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.float()
        optimizer.step()
        if rule == "adagrad":
            ops.dense_adagrad_(weights, moments, grads, shadows, 0.1, EPS)
        else:
            ops.dense_sgd_(weights, grads, shadows, 0.1)
    torch.testing.assert_close(weights, [parameter.data for parameter in theirs], rtol=1e-5, atol=1e-6)
    if rule == "adagrad":
        sums = [optimizer.state[parameter]["sum"] for parameter in theirs]
        torch.testing.assert_close(moments, sums, rtol=1e-5, atol=1e-6)
    for shadow, weight in zip(shadows, weights, strict=False):
        assert torch.equal(shadow, weight.bfloat16())


def test_references_of_the_optimizers_agree_with_the_kernels():
    weights, grads = random_parameters(0, [(129, 3), (40000,), (1,)], torch.bfloat16)
    state = [weights, [torch.rand_like(w) for w in weights], grads, [w.bfloat16() for w in weights]]
    other = copy.deepcopy(state)
    ops.dense_adagrad_(*state, 0.1, EPS)
    reference.dense_adagrad_reference(*other, 0.1, EPS)
    torch.testing.assert_close(state, other)
    ops.dense_sgd_(state[0], state[2], state[3], 0.1)
    reference.dense_sgd_reference(other[0], other[2], other[3], 0.1)
    torch.testing.assert_close(state, other)


def test_nan_stays_nan_in_the_shadow():
    weight, shadow = torch.zeros(40), torch.zeros(40, dtype=torch.bfloat16)
    grad = torch.full((40,), torch.nan)
    ops.dense_sgd_([weight], [grad], [shadow], 0.1)
    assert shadow.isnan().all()


def exact_interaction(dense: torch.Tensor, pooled: torch.Tensor, itself: bool) -> torch.Tensor:
    """Returns the dot interaction in float64, computed one pair at a time."""
    features = [dense.double(), *pooled.double().unbind(1)]
    pairs = [(features[i] * features[j]).sum(1) for i in range(len(features)) for j in range(i + itself)]
    return torch.cat([features[0], *[pair[:, None] for pair in pairs]], dim=1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32), batch=st.integers(0, 40), tables=st.integers(0, 30), dim=sizes, itself=st.booleans(),
    dense_type=types, pooled_type=types,
)  # fmt: skip
def test_interaction_is_exact_up_to_rounding(seed, batch, tables, dim, itself, dense_type, pooled_type):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, dim, generator=generator).to(dense_type).requires_grad_()
    pooled = torch.randn(batch, tables, dim, generator=generator).to(pooled_type).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (dense, pooled)]
    output, expected = ops.dot_interaction(dense, pooled, itself), exact_interaction(*exact, itself)
    assert output.dtype == dense_type
    grad = torch.randn(output.shape, generator=generator).to(dense_type)
    grads = torch.autograd.grad(output, (dense, pooled), grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double(), materialize_grads=True)
    for ours, theirs in zip((output, *grads), (expected, *expected_grads), strict=True):
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * scale / 2)


@pytest.mark.parametrize("itself", [False, True])
def test_gradients_equal_finite_differences(dot_interaction, itself):
    """A central difference is exact but for rounding, because the interaction is quadratic in the features."""
    dense, pooled, step = torch.randn(3, 5), torch.randn(3, 4, 5), 0.5
    output = ops.dot_interaction(dense, pooled, itself)
    grad = torch.randn_like(output)
    by_dense, by_pooled = ops.dot_interaction_backward(grad, dense, pooled, itself)
    for tensor, gradient in ((dense, by_dense), (pooled, by_pooled)):
        direction = torch.randn_like(tensor)
        shifted = [
            dot_interaction(*(t + sign * step * direction if t is tensor else t for t in (dense, pooled)), itself)
            for sign in (1, -1)
        ]
        difference = ((shifted[0] - shifted[1]) * grad).sum() / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("dense_type", [torch.float32, torch.bfloat16])
def test_references_of_the_interaction_agree_with_the_kernels(itself, dense_type):
    dense, pooled = torch.randn(7, 20).to(dense_type), torch.randn(7, 8, 20)
    output = ops.dot_interaction(dense, pooled, itself)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dense_type == torch.bfloat16 else {}
    torch.testing.assert_close(output, reference.dot_interaction_reference(dense, pooled, itself), **tolerance)
    arguments = (torch.randn_like(output), dense, pooled, itself)
    torch.testing.assert_close(
        ops.dot_interaction_backward(*arguments),
        reference.dot_interaction_backward_reference(*arguments),
        **tolerance,
    )


def test_no_result_depends_on_the_number_of_threads():
    def all_results():
        torch.manual_seed(0)
        dense, pooled = torch.randn(333, 48).bfloat16(), torch.randn(333, 9, 48)
        output = ops.dot_interaction(dense, pooled, False)
        grads = ops.dot_interaction_backward(torch.randn_like(output), dense, pooled, False)
        weights, optimizer_grads = random_parameters(0, [(1001, 77), (13,), (50001,)], torch.bfloat16)
        moments, shadows = [torch.zeros_like(w) for w in weights], [w.bfloat16() for w in weights]
        for _ in range(3):
            ops.dense_adagrad_(weights, moments, optimizer_grads, shadows, 0.1, EPS)
        return [output, *grads, *weights, *moments, *shadows]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(all_results())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_opcheck():
    weights, grads = random_parameters(0, [(5, 3), (2,)], torch.bfloat16)
    moments, shadows = [torch.zeros_like(w) for w in weights], [w.bfloat16() for w in weights]
    opcheck(ops.dense_adagrad_.default, (weights, moments, grads, shadows, 0.1, EPS))
    opcheck(ops.dense_adagrad_.default, (weights, moments, grads, [], 0.1, EPS))
    opcheck(ops.dense_sgd_.default, (weights, grads, shadows, 0.1))
    for itself in (False, True):
        dense, pooled = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
        opcheck(ops.dot_interaction.default, (dense, pooled, itself))
        grad = torch.randn(3, 5 + reference.num_pairs(5, itself))
        opcheck(ops.dot_interaction_backward.default, (grad, dense.detach(), pooled.detach(), itself))


@pytest.mark.skipif(not HAS_KERNELS, reason="the C++ kernels are not built")
def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        ops.dot_interaction(torch.zeros(2, 3).double(), torch.zeros(2, 1, 3), False)
    with pytest.raises(RuntimeError, match=r"\(B, D\)"):
        ops.dot_interaction(torch.zeros(2, 3), torch.zeros(2, 1, 4), False)
    with pytest.raises(RuntimeError, match="a moment"):
        ops.dense_adagrad_([torch.zeros(3)], [torch.zeros(4)], [torch.zeros(3)], [], 0.1, EPS)
    with pytest.raises(RuntimeError, match="one gradient"):
        ops.dense_sgd_([torch.zeros(3)], [], [], 0.1)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), batch=sizes, width=sizes)
def test_relu_backward_is_exact(seed, batch, width):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(batch, width, generator=generator).bfloat16()
    output = torch.randn(batch, width, generator=generator).relu().bfloat16()
    rows, columns, bias = ops.relu_backward(grad, output)
    expected = grad * (output > 0)
    assert torch.equal(rows, expected)
    assert torch.equal(columns, expected.t())
    torch.testing.assert_close(bias.double(), expected.double().sum(0), rtol=1e-2, atol=1e-5)
    references = reference.relu_backward_reference(grad, output)
    torch.testing.assert_close((rows, columns), references[:2])


def test_relu_backward_does_not_depend_on_the_number_of_threads():
    grad, output = torch.randn(2, 333, 500).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.relu_backward(grad, output))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_opcheck_of_relu_backward():
    opcheck(ops.relu_backward.default, (torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()))


@pytest.fixture(params=["op", "reference"])
def cross_ops(request):
    """The forward and backward of a cross layer."""
    if request.param == "op":
        return ops.cross, ops.cross_backward
    return reference.cross_reference, reference.cross_backward_reference


CROSS_SHAPES = [(0, 5), (1, 1), (5, 3), (33, 70), (64, 64), (97, 130)]


@pytest.mark.parametrize("data_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_cross_is_exact_up_to_rounding(cross_ops, data_type, shape, adds):
    generator = torch.Generator().manual_seed(sum(shape))
    first, product, x, grad, later = torch.randn(5, *shape, generator=generator).to(data_type)
    bias = torch.randn(shape[1], generator=generator).to(data_type)
    exact = [tensor.double().requires_grad_() for tensor in (first, product, bias, x)]
    output = exact[0] * (exact[1] + exact[2]) + exact[3]
    grads = torch.autograd.grad(output, exact, grad.double())
    forward, backward = cross_ops
    found = forward(first, product, bias, x)
    grad_first, rows, columns, sums = backward(grad, first, product, bias, later if adds else None)
    rounding = 4e-7 if data_type == torch.float32 else 4e-3
    expected = output, grads[0] + later.double() * adds, grads[1]
    for ours, theirs in zip((found, grad_first, rows), expected, strict=True):
        assert ours.dtype == data_type
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=4e-6)
    torch.testing.assert_close(sums.double(), rows.double().sum(0), rtol=rounding, atol=1e-4)
    if data_type == torch.bfloat16:
        assert torch.equal(columns, rows.t())


def test_gradients_of_cross_equal_finite_differences(cross_ops):
    """A central difference is exact but for rounding, because the output is linear in each argument."""
    forward, backward = cross_ops
    arguments = {name: torch.randn(7, 20) for name in ("first", "product", "x")} | {"bias": torch.randn(20)}
    grad = torch.randn(7, 20)
    others = {name: tensor for name, tensor in arguments.items() if name != "x"}
    grad_first, rows, _, sums = backward(grad=grad, later=None, **others)
    for name, gradient in {"first": grad_first, "product": rows, "bias": sums, "x": grad}.items():
        direction = torch.randn_like(gradient)
        above, below = (forward(**arguments | {name: arguments[name] + sign * direction}) for sign in (1, -1))
        difference = ((above - below) * grad).sum() / 2
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("data_type", [torch.float32, torch.bfloat16])
def test_cross_does_not_depend_on_the_number_of_threads(data_type):
    first, product, x, grad = torch.randn(4, 333, 500).to(data_type)
    bias = torch.randn(500).to(data_type)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append([ops.cross(first, product, bias, x), *ops.cross_backward(grad, first, product, bias, x)])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("data_type", [torch.float32, torch.bfloat16])
def test_opcheck_of_cross(data_type):
    first, product, x = torch.randn(3, 5, 3).to(data_type)
    opcheck(ops.cross.default, (first, product, x[0], x))
    opcheck(ops.cross_backward.default, (x, first, product, x[0], None))
    opcheck(ops.cross_backward.default, (x, first, product, x[0], product))


@pytest.mark.skipif(not HAS_KERNELS, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3)), "the product must be"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 3)), "the bias must be"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3).bfloat16()), "x must be"),
    ],
)
def test_arguments_of_cross_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.cross(*arguments)


def random_matrix(generator: torch.Generator, rows: int, columns: int, by_columns: bool) -> torch.Tensor:
    if by_columns:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32), rows=sizes, inner=st.integers(1, 1200), columns=st.integers(1, 300), relu=st.booleans(),
    with_bias=st.booleans(), by_columns=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_matrix_product_is_that_of_float64(seed, rows, inner, columns, relu, with_bias, by_columns):
    generator = torch.Generator().manual_seed(seed)
    left = random_matrix(generator, rows, inner, by_columns[0])
    right = random_matrix(generator, inner, columns, by_columns[1])
    bias = torch.randn(columns, generator=generator) if with_bias else None
    out = torch.full((rows, columns), torch.nan)
    ops.matrix_product(left, right, bias, relu, out)
    added = torch.zeros(columns).double() if bias is None else bias.double()
    exact = left.double() @ right.double() + added
    # Each of the `inner` additions rounds by at most 2^-24 of the sum of absolute values.
    bound = 1.001 * (inner + 1) * 2**-24 * (left.double().abs() @ right.double().abs() + added.abs())
    assert ((out - (exact.relu() if relu else exact)).abs() <= bound).all()


def test_matrix_product_does_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(5)
    left, right = random_matrix(generator, 100, 700, False), random_matrix(generator, 700, 150, True)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(torch.empty(100, 150))
            ops.matrix_product(left, right, None, False, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("products", [*PRODUCTS.values(), bf16_products()], ids=[*PRODUCTS, "bf16"])
def test_numbers_that_are_not_finite_stay_so(products):
    data_type = torch.bfloat16 if products == bf16_products() else torch.float32
    x = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]], dtype=data_type)
    output = products.output(x, torch.ones(2, 2, dtype=data_type), torch.ones(2, dtype=data_type), True)
    torch.testing.assert_close(output.float(), torch.tensor([[torch.nan] * 2, [torch.inf] * 2]), equal_nan=True)


def test_opcheck_of_matrix_product():
    arguments = torch.randn(5, 3), torch.randn(7, 3).t(), torch.randn(7), True, torch.empty(5, 7)
    opcheck(ops.matrix_product.default, arguments)


@pytest.mark.skipif(not HAS_KERNELS, reason="plain torch has messages of its own")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": torch.ones(4, 7)}, r"\(m, k\) and \(k, n\)"),
        ({"left": torch.ones(5, 3).bfloat16()}, "float32 matrices"),
        ({"left": torch.ones(10, 6)[::2, ::2]}, "contiguous rows or columns"),
        ({"out": torch.empty(7, 5).t()}, "the output is not a contiguous"),
        ({"out": torch.empty(5, 8)}, "the output is not a contiguous float32 matrix of 5 by 7"),
        ({"bias": torch.ones(5)}, "the bias does not have 7"),
    ],
)
def test_wrong_matrices_are_refused(change, message):
    arguments = {"left": torch.ones(5, 3), "right": torch.ones(3, 7), "bias": None, "out": torch.empty(5, 7)} | change
    with pytest.raises(RuntimeError, match=message):
        ops.matrix_product(relu=False, **arguments)


@settings(deadline=None, max_examples=60)
@given(
    gemm=st.sampled_from(list(PRODUCTS)), seed=st.integers(0, 2**32), batch=sizes, inputs=sizes, outputs=sizes,
    relu=st.booleans(), data_type=types,
)  # fmt: skip
def test_layer_differs_from_float64_no_more_than_plain_torch_does(gemm, seed, batch, inputs, outputs, relu, data_type):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = (
        torch.randn(size, generator=generator).to(data_type)
        for size in ((batch, inputs), (outputs, inputs), (outputs,), (batch, outputs))
    )

    def plain(type_):
        leaves = [tensor.to(type_).requires_grad_() for tensor in (x, weight, bias)]
        output = torch.nn.functional.linear(*leaves)
        output = output.relu() if relu else output
        return output, *torch.autograd.grad(output, leaves, grad.to(type_))

    def ours():
        gradients = (torch.full_like(weight, torch.nan), torch.full_like(bias, torch.nan))
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        products = PRODUCTS[gemm] if data_type == torch.float32 else bf16_products()
        output = FusedLinear.apply(*leaves, gradients, relu, products)
        output.backward(grad)
        return output, leaves[0].grad, *gradients

    tolerance = 0.02 if data_type == torch.bfloat16 else 1e-5
    for own, theirs, exact in zip(ours(), plain(data_type), plain(torch.float64), strict=True):
        allowed = 2 * (theirs.double() - exact).abs().max() + tolerance * (1 + exact.abs().max())
        assert (own.double() - exact).abs().max() <= allowed


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32), batch=sizes, inputs=sizes, outputs=sizes, relu=st.booleans(),
    layer_type=st.sampled_from([FusedLayer, PlainLayer]),
)  # fmt: skip
def test_rounded_products_in_float32_are_those_of_bfloat16_numbers(seed, batch, inputs, outputs, relu, layer_type):
    """A layer on a processor without bfloat16 products, against float64 products of the same rounded numbers."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = (
        torch.randn(size, generator=generator)
        for size in ((batch, inputs), (outputs, inputs), (outputs,), (batch, outputs))
    )
    layer = layer_type(weight, bias, relu, torch.float32)
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.backward(grad)

    rounded = [t.bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    exact = torch.nn.functional.linear(*rounded)
    exact = exact.relu() if relu else exact
    exact.backward(grad.double())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(layer.gradients, (rounded[1].grad, rounded[2].grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(leaf.grad, leaf.grad.bfloat16().float())
    torch.testing.assert_close(leaf.grad.double(), rounded[0].grad, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("rule", [FusedDenseSGD, FusedDenseAdagrad])
def test_shadows_in_float32_follow_the_rounded_weights(rule):
    layers = [FusedLayer(torch.randn(n, m), torch.randn(n), True, torch.float32) for m, n in ((3, 5), (5, 2))]
    optimizer = rule(layers, lr=0.1)
    for _ in range(3):
        for layer in layers:
            layer.gradients = [torch.randn_like(leaf) for leaf in layer.leaves]
        optimizer.step()
    for layer in layers:
        for shadow, weight in zip(layer.shadows, (layer.weight, layer.bias), strict=True):
            assert torch.equal(shadow, weight.bfloat16().float())


@pytest.mark.parametrize("rule", ["fused", "foreach"])
def test_adagrads_settings_are_those_of_torch_optim(rule):
    settings = {"eps": 0.1, "initial_accumulator_value": 0.5}
    layers = [FusedLayer(torch.randn(n, m), torch.randn(n), True) for m, n in ((3, 5), (5, 2))]
    leaves = [leaf for layer in layers for leaf in (layer.weight, layer.bias)]
    theirs = [leaf.detach().clone() for leaf in leaves]
    theirs_optimizer = torch.optim.Adagrad(theirs, lr=0.1, **settings)
    if rule == "fused":
        optimizer = FusedDenseAdagrad(layers, lr=0.1, **settings)
    else:
        optimizer = ForeachAdagrad(leaves, lr=torch.tensor([0.1]), **settings)
    for _ in range(3):
        for layer in layers:
            layer.gradients = [torch.randn_like(leaf) for leaf in layer.leaves]
        for leaf, their, grad in zip(leaves, theirs, [g for layer in layers for g in layer.gradients], strict=True):
            leaf.grad, their.grad = grad.clone(), grad.clone()
        optimizer.step()
        theirs_optimizer.step()
    torch.testing.assert_close([leaf.detach() for leaf in leaves], theirs)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_bf16_trains_as_well_without_bfloat16_products(mode, script, monkeypatch):
    flags = f"--mode={mode} --num-batches=30 --mini-batch-size=32 --learning-rate=0.05 --round-targets --print-time "

    def losses(text: str) -> torch.Tensor:
        return torch.tensor([float(loss) for loss in re.findall(r"it, loss ([\d.]+)", text)])

    fp32 = losses(script(flags)[1])
    monkeypatch.setattr("dlrm.devices.cpu.multiplies_bf16", lambda: False)
    status, output, errors = script(flags + "--data_type=bf16")
    assert (status, errors) == (0, "")
    assert "This processor has no bfloat16 products: layers multiply rounded numbers in fp32." in output
    assert "bf16 rounded, fp32 multiplied" in output
    torch.testing.assert_close(losses(output), fp32, rtol=0, atol=0.02)
    assert not torch.equal(losses(output), fp32)
