"""The ops of the trainer: what each one means, in plain torch.

    dlrm::draw_random_batch         a generator -> a batch of random data, or one rank's share of it
    dlrm::coalesce_lookups          raw lookups -> lookups checked and grouped by row, in tensors of fixed sizes
    dlrm::pad_lookups               lookups grouped by row -> a rectangle of places, for devices that need static shapes
    dlrm::embedding_bag_sum         tables, lookups -> pooled rows, (B, T, D)
    dlrm::sparse_adagrad_           gradient of the pooled rows -> tables and moments, in place
    dlrm::sparse_rowwise_adagrad_   gradient of the pooled rows -> tables and moments, one per row, in place
    dlrm::sparse_sgd_               gradient of the pooled rows -> tables, in place
    dlrm::dense_adagrad_            gradients of dense weights -> weights, moments and bfloat16 shadows, in place
    dlrm::dense_sgd_                gradients of dense weights -> weights and bfloat16 shadows, in place
    dlrm::dot_interaction           dense feature (B, D), pooled rows (B, T, D) -> (B, D + pairs)
    dlrm::cross                     a cross layer's product, its first input, its input -> its output
    dlrm::matrix_product            two float32 matrices, a bias -> their product, perhaps after a ReLU, in place
    dlrm::relu_backward             gradient of a ReLU's output -> gradient of its input: rows, columns and sum
    dlrm::advise_huge_pages         a large tensor -> the same tensor, in fewer pages

Each op is a schema, a fake implementation that only knows shapes, and a reference implementation in plain torch, which
states what the op means and runs on any device that has no kernel of its own. The kernels for the CPU are in csrc/.
`draw_random_batch` has no reference here: where there is no kernel, `dlrm/data/random_data.py` draws the same batches
with numpy.

B batch, T tables, F = T + 1 features, D embedding dimension, N room for lookups in all tables, U rows that the lookups
of one table hit. `max_lookups` is the room for lookups in each table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake
from torch.nn.functional import embedding_bag

from dlrm.kernels.lookups import PreparedLookups, check_lookups


def reference(op: str) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers a function as `op` on devices without a kernel of their own."""

    def register(function: Callable) -> Callable:
        impl(op, "default", function)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Random data
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::draw_random_batch",
    "(Tensor(a!) generator, int[] table_rows, int[] lookups, bool fixed, str distribution, float[] parameters, "
    "Tensor(b!)[] traces, Tensor[] trace_distributions, int first_sample, int[] tables, Tensor(c!) dense, "
    "Tensor(d!) indices, Tensor(e!) offsets, Tensor(f!) target) -> ()",
)


@register_fake("dlrm::draw_random_batch")
def _(*arguments) -> None:
    """Draws a whole batch in the order of the reference script, and keeps one rank's share of it.

    A bag of table t has `lookups[t]` lookups, or at most so many. The share is the dense features (b, features) and
    targets (b, 1) of b samples, `first_sample` being the first, and the lookups in n `tables`: `indices`, with room for
    B * lookups[t] in each of these tables, one after the other, and `offsets` (n, B + 1), whose last entries say how
    many indices count. Afterwards `generator` stands behind the batch, and so do the traces of the n tables.
    """
    *_, tables, dense, _, offsets, target = arguments
    torch._check(len(tables) == len(offsets), lambda: "needs one row of offsets per table")
    torch._check(len(dense) == len(target), lambda: "needs one target per sample")


# ---------------------------------------------------------------------------------------------------------------------
# Lookups
# ---------------------------------------------------------------------------------------------------------------------

GROUPED_LOOKUPS = (
    "Tensor unique_indices, Tensor output_rows, Tensor output_row_offsets, Tensor unique_count, int[] max_lookups"
)

define(
    "dlrm::coalesce_lookups",
    "(Tensor[] indices, Tensor offsets, int[] table_rows, int[] max_lookups, Tensor(a!) indices_fwd, "
    "Tensor(b!) offsets_fwd, Tensor(c!) valid_count_fwd, Tensor(d!) unique_indices, Tensor(e!) output_rows, "
    "Tensor(f!) output_row_offsets, Tensor(g!) valid_count_bwd, Tensor(h!) unique_count) -> ()",
)


@register_fake("dlrm::coalesce_lookups")
def _(indices, offsets, table_rows, max_lookups, *prepared) -> None:
    torch._check(
        len(indices) == len(table_rows) == len(max_lookups) == offsets.shape[0],
        lambda: "needs one tensor of indices, one row of offsets, one number of rows and one of lookups per table",
    )


@reference("dlrm::coalesce_lookups")
def coalesce_lookups_reference(
    indices: Sequence[Tensor],
    offsets: Tensor,
    table_rows: Sequence[int],
    max_lookups: Sequence[int],
    *prepared: Tensor,
) -> None:
    """Fills the fields of a `PreparedLookups` from raw lookups, in place.

    `indices[t]`: (lookups,) int32 or int64; `offsets`: (T, B + 1) int32 or int64; `table_rows[t]`: the number of rows
    of table t. Raises IndexError for a lookup outside its table and ValueError for offsets that are not offsets. The
    error names table and sample.
    """
    bags = torch.arange(offsets.shape[1] - 1)
    for t, into in enumerate(PreparedLookups(max_lookups, *prepared).by_table()):
        rows, starts = indices[t], offsets[t]
        check_lookups(t, rows, starts, table_rows[t], max_lookups[t])
        in_row_order, order = rows.sort(stable=True)
        unique, occurrences = in_row_order.unique_consecutive(return_counts=True)
        into.indices_fwd[: len(rows)] = rows
        into.offsets[:] = starts
        into.valid_count_fwd[:] = torch.tensor([len(starts), len(rows)])
        into.unique_indices[: len(unique)] = unique
        into.output_rows[: len(rows)] = bags.repeat_interleave(starts.diff())[order]
        into.output_row_offsets[0] = 0
        into.output_row_offsets[1 : len(unique) + 1] = occurrences.cumsum(0)
        into.valid_count_bwd[:] = torch.tensor([len(unique) + 1, len(rows)])
        into.unique_count[:] = len(unique)


define(
    "dlrm::pad_lookups",
    f"(Tensor offsets, {GROUPED_LOOKUPS}, int[] table_rows, Tensor(a!) unique_rows, Tensor(b!) positions) -> ()",
)


@register_fake("dlrm::pad_lookups")
def _(offsets, unique_indices, output_rows, output_row_offsets, unique_count, max_lookups, table_rows, *_) -> None:
    torch._check(
        offsets.shape[0] == len(table_rows) == len(max_lookups),
        lambda: "needs one row of offsets, one number of rows and one of lookups per table",
    )


@reference("dlrm::pad_lookups")
def pad_lookups_reference(
    offsets: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    max_lookups: Sequence[int],
    table_rows: Sequence[int],
    unique_rows: Tensor,
    positions: Tensor,
) -> None:
    """Fills the fields of a `StaticLookups` from those of a `PreparedLookups`, in place.

    A table has room for `max_lookups[t] / B` lookups per bag. The places of a bag's lookups are ordered by row.
    """
    first_rows = itertools.accumulate(table_rows, initial=0)
    first_places = itertools.accumulate(max_lookups, initial=0)
    groups = output_row_offsets.split([room + 1 for room in max_lookups])
    unique_rows.fill_(sum(table_rows))
    positions.fill_(len(unique_rows) - 1)
    for t, (first_row, first, room) in enumerate(zip(first_rows, first_places, max_lookups, strict=False)):
        unique, lookups_per_bag = int(unique_count[t]), room // (offsets.shape[1] - 1)
        group_starts = groups[t][: unique + 1]
        bags = output_rows[first : first + group_starts[-1]].long()
        places = first + torch.arange(unique, dtype=torch.int32).repeat_interleave(group_starts.diff())
        by_bag = bags.argsort(stable=True)
        number_in_bag = torch.arange(len(bags)) - offsets[t, bags[by_bag]]
        unique_rows[first : first + unique] = unique_indices[first : first + unique] + first_row
        positions[first + bags[by_bag] * lookups_per_bag + number_in_bag] = places[by_bag]


# ---------------------------------------------------------------------------------------------------------------------
# The embedding bag
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::embedding_bag_sum", "(Tensor[] weights, Tensor indices_fwd, Tensor offsets, int[] max_lookups) -> Tensor")


@register_fake("dlrm::embedding_bag_sum")
def _(weights, indices_fwd, offsets, max_lookups) -> Tensor:
    torch._check(len(weights) == offsets.shape[0], lambda: f"{len(weights)} tables, but offsets for {offsets.shape[0]}")
    shape = (offsets.shape[1] - 1, len(weights), weights[0].shape[1])
    return weights[0].new_empty(shape, dtype=torch.promote_types(weights[0].dtype, torch.float32))


@reference("dlrm::embedding_bag_sum")
def embedding_bag_sum_reference(
    weights: Sequence[Tensor], indices_fwd: Tensor, offsets: Tensor, max_lookups: Sequence[int]
) -> Tensor:
    """Returns the sum over each bag of the rows that it looks up, (B, T, D) float32. An empty bag gives zeros.

    `weights[t]`: (rows, D) float32 or bfloat16; `indices_fwd`, `offsets`: as in `PreparedLookups`.
    """
    at_least_float = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    indices = indices_fwd.split(list(max_lookups))
    return torch.stack([sum_bags(*table) for table in zip(at_least_float, indices, offsets, strict=True)], dim=1)


def sum_bags(rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sum over each bag of the rows that it looks up, (bags, D).

    `rows`: (n, D); `offsets`: (bags + 1,), whose last entry says how many of the `indices` count.
    """
    return embedding_bag(indices[: offsets[-1]], rows, offsets, mode="sum", include_last_offset=True)


def _save_lookups(ctx, inputs, output) -> None:
    weights, indices_fwd, offsets, ctx.max_lookups = inputs
    ctx.table_rows = [len(weight) for weight in weights]
    ctx.save_for_backward(indices_fwd, offsets)


def _dense_gradients(ctx, grad_pooled: Tensor):
    """Returns one dense gradient per table, (rows, D).

    Training never needs them. They are for callers that differentiate with respect to a table.
    """
    indices_fwd, offsets = ctx.saved_tensors
    gradients = []
    for t, (rows, indices) in enumerate(zip(ctx.table_rows, indices_fwd.split(list(ctx.max_lookups)), strict=True)):
        position = torch.arange(len(indices), dtype=offsets.dtype, device=offsets.device)
        bag = torch.searchsorted(offsets[t], position, right=True) - 1  # B for positions past the last lookup
        in_some_bag = bag < len(grad_pooled)
        by_lookup = grad_pooled[bag.clamp(max=len(grad_pooled) - 1), t] * in_some_bag[:, None]
        gradient = grad_pooled.new_zeros(rows, grad_pooled.shape[2])
        gradients.append(gradient.index_add(0, indices * in_some_bag, by_lookup))
    return gradients, None, None, None


register_autograd("dlrm::embedding_bag_sum", _dense_gradients, setup_context=_save_lookups)


# ---------------------------------------------------------------------------------------------------------------------
# Sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::sparse_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int[]? seeds=None) -> ()",
)
define(
    "dlrm::sparse_rowwise_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int[]? seeds=None) -> ()",
)
define(
    "dlrm::sparse_sgd_",
    f"(Tensor(a!)[] weights, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, int[]? seeds=None) -> ()",
)


@register_fake("dlrm::sparse_adagrad_")
@register_fake("dlrm::sparse_rowwise_adagrad_")
def _(weights, moments, grad_pooled, *_, **__) -> None:
    torch._check(
        len(weights) == len(moments) == grad_pooled.shape[1], lambda: "needs one moment and one gradient per table"
    )


@register_fake("dlrm::sparse_sgd_")
def _(weights, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == grad_pooled.shape[1], lambda: "needs one gradient per table")


@reference("dlrm::sparse_adagrad_")
def sparse_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    max_lookups: Sequence[int],
    lr: float,
    eps: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Updates each looked-up row r by Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it):

        moment[r] += g^2;  weight[r] -= lr * g / (sqrt(moment[r]) + eps)

    g is the sum of the gradients of all lookups of row r. The update is not linear in g, so it needs the whole sum:
    this is why the lookups are grouped by row.

    `weights[t]`: (rows, D) float32 or bfloat16; `moments[t]`: (rows, D) float32; `grad_pooled`: (B, T, D), float32 or
    bfloat16; `seeds[t]`: as in `subtract_from_rows`; all other tensors: as in `PreparedLookups`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count, max_lookups)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square())
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows].sqrt() + eps), seeds and seeds[t])


@reference("dlrm::sparse_rowwise_adagrad_")
def sparse_rowwise_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    max_lookups: Sequence[int],
    lr: float,
    eps: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Updates each looked-up row by Adagrad with one moment per row, to which the mean of g^2 is added.

    It is for tables whose moments would not fit into memory otherwise. `moments[t]`: (rows,) float32. g and the other
    arguments are those of `sparse_adagrad_reference`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count, max_lookups)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square().mean(1))
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows, None].sqrt() + eps), seeds and seeds[t])


@reference("dlrm::sparse_sgd_")
def sparse_sgd_reference(
    weights: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    max_lookups: Sequence[int],
    lr: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Updates each looked-up row r by SGD: weight[r] -= lr * g.

    g and the arguments are those of `sparse_adagrad_reference`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count, max_lookups)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        subtract_from_rows(weights[t], rows, lr * gradient, seeds and seeds[t])


def row_gradients(
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    max_lookups: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each table the rows that were looked up, (U,) int64, and their gradients, (U, D) float32."""
    rows, bags = unique_indices.split(list(max_lookups)), output_rows.split(list(max_lookups))
    groups = output_row_offsets.split([room + 1 for room in max_lookups])
    for t, unique in enumerate(unique_count.flatten().tolist()):
        grad_of_bags = grad_pooled[:, t].float().contiguous()
        yield rows[t][:unique].long(), sum_bags(grad_of_bags, bags[t], groups[t][: unique + 1])


def subtract_from_rows(weight: Tensor, rows: Tensor, steps: Tensor, seed: int | None) -> None:
    """Subtracts `steps` (U, D) from the given rows (U,) of `weight`.

    A bfloat16 weight is rounded by `randomly_rounded` if there is a seed, and to the nearest value otherwise.
    """
    values = weight[rows].float() - steps
    if weight.dtype == torch.bfloat16 and seed is not None:
        values = randomly_rounded(values, rows, seed)
    weight[rows] = values.to(weight.dtype)


def randomly_rounded(values: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Returns `values` (U, D), float32, each rounded up or down to a value of bfloat16 so that the mean stays right.

    The expected value of the result is the value itself, so steps that are too small for the 8 bits of a bfloat16 add
    up instead of vanishing. The random bits are a hash of seed + row and of the column, and depend on nothing else.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    key = murmur_hash(seed + rows)  # (U,)
    random_bits = murmur_hash(key[:, None] + columns) & 0xFFFF
    rounded = (values.view(torch.int32) + random_bits.int()) & ~0xFFFF
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def rounding_seeds(update: int, tables: Sequence[int], first_rows: Sequence[int]) -> list[int]:
    """Returns the seeds for the random rounding of one update, one per piece of a table.

    Piece p starts at row `first_rows[p]` of table `tables[p]`. A row is rounded as it would be in the whole table.
    """
    return (murmur_hash(murmur_hash(torch.tensor(update)) + torch.tensor(tables)) + torch.tensor(first_rows)).tolist()


def murmur_hash(x: Tensor) -> Tensor:
    """Returns a hash of the low 32 bits of each element of an int64 tensor: the finalizer of MurmurHash3."""
    x = x & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


# ---------------------------------------------------------------------------------------------------------------------
# Dense optimizers
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::dense_adagrad_",
    "(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor[] grads, Tensor(c!)[] shadows, float lr, float eps) -> ()",
)
define("dlrm::dense_sgd_", "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] shadows, float lr) -> ()")


@register_fake("dlrm::dense_adagrad_")
def _(weights, moments, grads, shadows, lr, eps) -> None:
    torch._check(len(weights) == len(moments) == len(grads), lambda: "needs one moment and one gradient per weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "needs one shadow per weight, or none at all")


@register_fake("dlrm::dense_sgd_")
def _(weights, grads, shadows, lr) -> None:
    torch._check(len(weights) == len(grads), lambda: "needs one gradient per weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "needs one shadow per weight, or none at all")


@reference("dlrm::dense_adagrad_")
def dense_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grads: Sequence[Tensor],
    shadows: Sequence[Tensor],
    lr: float,
    eps: float,
) -> None:
    """Updates every element by Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it):

        moment += g^2;  weight -= lr * g / (sqrt(moment) + eps);  shadow = bfloat16(weight)

    `weights[p]`, `moments[p]`: float32; `grads[p]`: float32 or bfloat16; `shadows[p]`: bfloat16, or no shadows at all.
    The four tensors of a parameter p have the same shape.
    """
    for weight, moment, grad in zip(weights, moments, grads, strict=True):
        grad = grad.float()
        moment.addcmul_(grad, grad)
        weight.addcdiv_(grad, moment.sqrt().add_(eps), value=-lr)
    for shadow, weight in zip(shadows, weights, strict=False):
        shadow.copy_(weight)


@reference("dlrm::dense_sgd_")
def dense_sgd_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], shadows: Sequence[Tensor], lr: float
) -> None:
    """Updates every element by SGD: weight -= lr * g; shadow = bfloat16(weight).

    The arguments are those of `dense_adagrad_reference`.
    """
    for weight, grad in zip(weights, grads, strict=True):
        weight.add_(grad.float(), alpha=-lr)
    for shadow, weight in zip(shadows, weights, strict=False):
        shadow.copy_(weight)


# ---------------------------------------------------------------------------------------------------------------------
# The dot interaction
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::dot_interaction", "(Tensor dense, Tensor pooled, bool itself) -> Tensor")
define("dlrm::dot_interaction_backward", "(Tensor grad, Tensor dense, Tensor pooled, bool itself) -> (Tensor, Tensor)")


def num_pairs(num_features: int, itself: bool) -> int:
    """Returns the number of pairs of features; with `itself`, each feature is also paired with itself."""
    return num_features * (num_features + (1 if itself else -1)) // 2


@register_fake("dlrm::dot_interaction")
def _(dense, pooled, itself) -> Tensor:
    batch, tables, dim = pooled.shape
    torch._check(
        dense.shape == (batch, dim),
        lambda: f"a dense feature of shape {tuple(dense.shape)} does not fit pooled rows of {tuple(pooled.shape)}",
    )
    return dense.new_empty(batch, dim + num_pairs(tables + 1, itself))


@register_fake("dlrm::dot_interaction_backward")
def _(grad, dense, pooled, itself) -> tuple[Tensor, Tensor]:
    return dense.new_empty(dense.shape), pooled.new_empty(pooled.shape)


@reference("dlrm::dot_interaction")
def dot_interaction_reference(dense: Tensor, pooled: Tensor, itself: bool) -> Tensor:
    """Returns the dense feature, then the dot product of each pair of features, (B, D + pairs) in the type of `dense`.

    The products are the lower triangle of X X^T, row by row, where the rows of X are the dense feature and the pooled
    rows. With `itself`, the diagonal is part of the triangle. `dense`: (B, D), `pooled`: (B, T, D), both float.
    """
    features = torch.cat([dense[:, None], pooled], dim=1)  # (B, F, D)
    products = torch.bmm(features, features.transpose(1, 2))  # (B, F, F)
    row, column = torch.tril_indices(*products.shape[1:], offset=0 if itself else -1, device=dense.device)
    return torch.cat([dense, products[:, row, column].to(dense.dtype)], dim=1)


@reference("dlrm::dot_interaction_backward")
def dot_interaction_backward_reference(
    grad: Tensor, dense: Tensor, pooled: Tensor, itself: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `dense` (B, D) and `pooled` (B, T, D), each in the type of its input.

    The gradient of X is (G + G^T) X, where G is the gradient of the triangle. `grad`: (B, D + pairs).
    """
    features = torch.cat([dense[:, None], pooled], dim=1)  # (B, F, D)
    batch, num_features, dim = features.shape
    row, column = torch.tril_indices(num_features, num_features, offset=0 if itself else -1, device=dense.device)
    triangle = features.new_zeros(batch, num_features, num_features)
    triangle[:, row, column] = grad[:, dim:].to(features.dtype)
    grad_features = torch.bmm(triangle + triangle.transpose(1, 2), features)
    return (grad_features[:, 0] + grad[:, :dim]).to(dense.dtype), grad_features[:, 1:].to(pooled.dtype).contiguous()


def _save_features(ctx, inputs, output) -> None:
    dense, pooled, ctx.itself = inputs
    ctx.save_for_backward(dense, pooled)


def _interaction_backward(ctx, grad: Tensor):
    return *torch.ops.dlrm.dot_interaction_backward(grad, *ctx.saved_tensors, ctx.itself), None


register_autograd("dlrm::dot_interaction", _interaction_backward, setup_context=_save_features)


# ---------------------------------------------------------------------------------------------------------------------
# Cross layers
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::cross", "(Tensor first, Tensor product, Tensor bias, Tensor x) -> Tensor")
define(
    "dlrm::cross_backward",
    "(Tensor grad, Tensor first, Tensor product, Tensor bias, Tensor? later) -> (Tensor, Tensor, Tensor, Tensor)",
)


@register_fake("dlrm::cross")
def _(first, product, bias, x) -> Tensor:
    torch._check(
        first.shape == product.shape == x.shape and bias.shape == first.shape[1:],
        lambda: "needs three tensors of one shape, (B, W), and a bias, (W,)",
    )
    return first.new_empty(first.shape)


@register_fake("dlrm::cross_backward")
def _(grad, first, product, bias, later) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, width = first.shape
    columns = first.new_empty(width if first.dtype == torch.bfloat16 else 0, batch)
    return first.new_empty(batch, width), first.new_empty(batch, width), columns, first.new_empty(width)


@reference("dlrm::cross")
def cross_reference(first: Tensor, product: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Returns first * (product + bias) + x, computed in float32 at least.

    `first`, `product`, `x`: (B, W); `bias`: (W,). All are float32, or all are bfloat16.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    return (first.to(wide) * (product.to(wide) + bias.to(wide)) + x.to(wide)).to(first.dtype)


@reference("dlrm::cross_backward")
def cross_backward_reference(
    grad: Tensor, first: Tensor, product: Tensor, bias: Tensor, later: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of `first`, to which `later` is added, and of `product`: as rows (B, W), as columns (W, B),
    and summed over the batch (W,).

    The sum is the gradient of the bias. The gradient of x is `grad`. There are columns in bfloat16 alone, where a
    product is faster with them; in other types, they are (0, B). `later` is the gradient of `first` from the cross
    layers after this one.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    grad_first = grad.to(wide) * (product.to(wide) + bias.to(wide))
    if later is not None:
        grad_first = grad_first + later.to(wide)
    grad_product = grad * first
    columns = grad_product.t().contiguous() if first.dtype == torch.bfloat16 else grad.new_empty(0, len(grad))
    return grad_first.to(first.dtype), grad_product, columns, grad_product.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::matrix_product",
    "(Tensor left, Tensor right, Tensor? bias, bool relu, Tensor(a!) out) -> ()",
)


@register_fake("dlrm::matrix_product")
def _(left, right, bias, relu, out) -> None:
    pass


@reference("dlrm::matrix_product")
def matrix_product_reference(left: Tensor, right: Tensor, bias: Tensor | None, relu: bool, out: Tensor) -> None:
    """Writes left right + bias to `out`, after a ReLU if `relu`.

    `left`: (m, k) float32; `right`: (k, n) float32, with contiguous rows or columns as `left`; `bias`: (n,) or None;
    `out`: (m, n), contiguous.
    """
    product = torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)
    out.copy_(product.relu_() if relu else product)


define("dlrm::relu_backward", "(Tensor grad, Tensor output) -> (Tensor, Tensor, Tensor)")


@register_fake("dlrm::relu_backward")
def _(grad, output) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = output.shape
    return output.new_empty(batch, width), output.new_empty(width, batch), output.new_empty(width)


@reference("dlrm::relu_backward")
def relu_backward_reference(grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradient of a ReLU's input: as rows (B, n), as columns (n, B), and summed over the batch (n,).

    The sum is the gradient of the bias before the ReLU. `output`: the ReLU's output, (B, n); `grad`: its gradient.
    """
    masked = torch.where(output > 0, grad, 0)
    return masked, masked.t().contiguous(), masked.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::advise_huge_pages", "(Tensor tensor) -> ()")


@register_fake("dlrm::advise_huge_pages")
@reference("dlrm::advise_huge_pages")
def _(tensor) -> None:
    """Asks for huge pages under a large tensor, where they exist: random rows then cost no walk of the page table."""
