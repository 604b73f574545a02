"""The ops of the trainer: what each one means, in plain torch.

    dlrm::draw_random_batch         a generator        -> dense features, lookups and targets, or a rank's part of them
    dlrm::coalesce_lookups          raw lookups of a batch -> bounds-checked, grouped by row, in tensors of fixed size
    dlrm::pad_lookups               those              -> a rectangle of places, for devices that want static shapes
    dlrm::embedding_bag_sum         all tables, all bags -> (B, T, D)
    dlrm::sparse_adagrad_           gradient of that   -> the tables and their moments, in place
    dlrm::sparse_rowwise_adagrad_                         likewise, with one moment a row
    dlrm::sparse_sgd_               gradient of that   -> the tables, in place
    dlrm::dot_interaction           (B, D), (B, T, D)  -> (B, D + pairs)
    dlrm::relu_backward             gradient of a ReLU -> as rows, as columns, and its sum
    dlrm::dense_adagrad_            gradients of all dense weights -> weights, moments and bfloat16 shadows, in place
    dlrm::dense_sgd_                                      likewise, without moments
    dlrm::advise_huge_pages         a large tensor     -> the same, in fewer pages

Each op is a schema, a fake implementation that only knows shapes, and a reference implementation in plain torch, which
states what the op means and runs on any device that has no kernel of its own. The kernels for the CPU are in csrc/.
What `draw_random_batch` means is in `dlrm/data/random_data.py`, which draws the same by numpy where there is no kernel.

B batch, T tables, F = T + 1 features, D embedding dimension, N most lookups of a table in a batch, U rows that a
table's lookups hit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake
from torch.nn.functional import embedding_bag

from dlrm.kernels.lookups import PreparedLookups, check_lookups


def reference(op: str) -> Callable[[Callable], Callable]:
    """Registers a function as what `op` does on devices without a kernel of their own, and leaves it callable."""

    def register(function: Callable) -> Callable:
        impl(op, "default", function)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Random data
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::draw_random_batch",
    "(Tensor(a!) generator, int[] table_rows, int lookups, bool fixed, str distribution, float[] parameters, "
    "Tensor(b!)[] traces, Tensor[] trace_distributions, int first_sample, int[] tables, Tensor(c!) dense, "
    "Tensor(d!) indices, Tensor(e!) offsets, Tensor(f!) target) -> ()",
)


@register_fake("dlrm::draw_random_batch")
def _(*arguments) -> None:
    """Draws all of a batch in the order of the public script, and keeps the dense features (b, features) and targets
    (b, 1) of b samples from `first_sample` on, and the lookups in n tables: `indices` (n, B * lookups), of which
    `offsets` (n, B + 1) tell how many count. `generator` moves on past the batch, and traces of those tables do."""
    *_, tables, dense, indices, offsets, target = arguments
    torch._check(len(tables) == len(indices) == len(offsets), lambda: "indices and offsets for each table")
    torch._check(len(dense) == len(target), lambda: "dense features and a target for each sample")


# ---------------------------------------------------------------------------------------------------------------------
# Lookups
# ---------------------------------------------------------------------------------------------------------------------

GROUPED_LOOKUPS = "Tensor unique_indices, Tensor output_rows, Tensor output_row_offsets, Tensor unique_count"

define(
    "dlrm::coalesce_lookups",
    "(Tensor[] indices, Tensor offsets, int[] table_rows, Tensor(a!) indices_fwd, Tensor(b!) offsets_fwd, "
    "Tensor(c!) valid_count_fwd, Tensor(d!) unique_indices, Tensor(e!) output_rows, Tensor(f!) output_row_offsets, "
    "Tensor(g!) valid_count_bwd, Tensor(h!) unique_count) -> ()",
)


@register_fake("dlrm::coalesce_lookups")
def _(indices, offsets, table_rows, *prepared) -> None:
    torch._check(len(indices) == len(table_rows) == offsets.shape[0], lambda: "one indices, offsets and rows a table")


@reference("dlrm::coalesce_lookups")
def coalesce_lookups_reference(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], *prepared: Tensor
) -> None:
    """Fills the fields of a `PreparedLookups` from raw lookups, in place.

    `indices[t]`: (lookups,) int32 or int64; `offsets`: (T, B + 1) int32 or int64; `table_rows[t]`: rows of table t.
    IndexError or ValueError, naming table and sample, for a lookup outside its table or offsets that are no offsets.
    """
    into = PreparedLookups(*prepared)
    bags = torch.arange(offsets.shape[1] - 1)
    for t, (rows, starts) in enumerate(zip(indices, offsets, strict=True)):
        check_lookups(t, rows, starts, table_rows[t], into.indices_fwd.shape[1])
        in_row_order, order = rows.sort(stable=True)
        unique, occurrences = in_row_order.unique_consecutive(return_counts=True)
        into.indices_fwd[t, : len(rows)] = rows
        into.offsets[t] = starts
        into.valid_count_fwd[t] = torch.tensor([len(starts), len(rows)])
        into.unique_indices[t, : len(unique)] = unique
        into.output_rows[t, : len(rows)] = bags.repeat_interleave(starts.diff())[order]
        into.output_row_offsets[t, 0] = 0
        into.output_row_offsets[t, 1 : len(unique) + 1] = occurrences.cumsum(0)
        into.valid_count_bwd[t] = torch.tensor([len(unique) + 1, len(rows)])
        into.unique_count[t] = len(unique)


define(
    "dlrm::pad_lookups",
    f"(Tensor offsets, {GROUPED_LOOKUPS}, int[] table_rows, Tensor(a!) unique_rows, Tensor(b!) positions) -> ()",
)


@register_fake("dlrm::pad_lookups")
def _(offsets, unique_indices, output_rows, output_row_offsets, unique_count, table_rows, *padded) -> None:
    torch._check(offsets.shape[0] == len(table_rows), lambda: "one offsets and rows a table")


@reference("dlrm::pad_lookups")
def pad_lookups_reference(
    offsets: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    table_rows: Sequence[int],
    unique_rows: Tensor,
    positions: Tensor,
) -> None:
    """Fills the fields of a `StaticLookups` from those of a `PreparedLookups`, in place.

    Within a bag, lookups come in the order of their rows.
    """
    room = unique_indices.shape[1]
    first_row = itertools.accumulate(table_rows, initial=0)
    unique_rows.fill_(sum(table_rows))
    positions.fill_(len(unique_rows) - 1)
    for t, (first, unique) in enumerate(zip(first_row, unique_count.flatten().tolist(), strict=False)):
        starts = output_row_offsets[t, : unique + 1]
        bags = output_rows[t, : starts[-1]].long()
        place = t * room + torch.arange(unique, dtype=torch.int32).repeat_interleave(starts.diff())
        by_bag = bags.argsort(stable=True)
        place_in_bag = torch.arange(len(bags)) - offsets[t, bags[by_bag]]
        unique_rows[t * room : t * room + unique] = unique_indices[t, :unique] + first
        positions[t, bags[by_bag], place_in_bag] = place[by_bag]


# ---------------------------------------------------------------------------------------------------------------------
# The embedding bag
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::embedding_bag_sum", "(Tensor[] weights, Tensor indices_fwd, Tensor offsets) -> Tensor")


@register_fake("dlrm::embedding_bag_sum")
def _(weights, indices_fwd, offsets) -> Tensor:
    torch._check(len(weights) == offsets.shape[0], lambda: f"{len(weights)} tables, offsets for {offsets.shape[0]}")
    shape = (offsets.shape[1] - 1, len(weights), weights[0].shape[1])
    return weights[0].new_empty(shape, dtype=torch.promote_types(weights[0].dtype, torch.float32))


@reference("dlrm::embedding_bag_sum")
def embedding_bag_sum_reference(weights: Sequence[Tensor], indices_fwd: Tensor, offsets: Tensor) -> Tensor:
    """pooled[b, t] = sum of weights[t][i] over the lookups i of bag b; an empty bag gives zeros.

    `weights[t]`: (rows, D) float32 or bfloat16; `indices_fwd`, `offsets`: as in `PreparedLookups`. Returns (B, T, D)
    float32.
    """
    at_least_float = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    return torch.stack([sum_bags(*table) for table in zip(at_least_float, indices_fwd, offsets, strict=True)], dim=1)


def sum_bags(rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(n, D), indices of which the last offset tells how many count, (bags + 1,) -> (bags, D)."""
    return embedding_bag(indices[: offsets[-1]], rows, offsets, mode="sum", include_last_offset=True)


def _save_lookups(ctx, inputs, output) -> None:
    weights, indices_fwd, offsets = inputs
    ctx.table_rows = [len(weight) for weight in weights]
    ctx.save_for_backward(indices_fwd, offsets)


def _dense_gradients(ctx, grad_pooled: Tensor):
    """A dense gradient for each table. Training never asks for it; whoever differentiates by a table does."""
    indices_fwd, offsets = ctx.saved_tensors
    position = torch.arange(indices_fwd.shape[1], dtype=offsets.dtype, device=offsets.device)
    gradients = []
    for t, rows in enumerate(ctx.table_rows):
        bag = torch.searchsorted(offsets[t], position, right=True) - 1  # B for positions past the last lookup
        in_some_bag = bag < len(grad_pooled)
        by_lookup = grad_pooled[bag.clamp(max=len(grad_pooled) - 1), t] * in_some_bag[:, None]
        gradient = grad_pooled.new_zeros(rows, grad_pooled.shape[2])
        gradients.append(gradient.index_add(0, indices_fwd[t] * in_some_bag, by_lookup))
    return gradients, None, None


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
    torch._check(len(weights) == len(moments) == grad_pooled.shape[1], lambda: "one moment and gradient a table")


@register_fake("dlrm::sparse_sgd_")
def _(weights, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == grad_pooled.shape[1], lambda: "one gradient a table")


@reference("dlrm::sparse_adagrad_")
def sparse_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    eps: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it) on the rows that were looked up, in place:

        moment[r] += g^2;  weight[r] -= lr * g / (sqrt(moment[r]) + eps),   g the sum of row r's gradients

    The update is not linear in g, so g must be whole: that is what the lookups are grouped for.
    `weights[t]`: (rows, D) float32 or bfloat16; `moments[t]`: (rows, D) float32; `grad_pooled`: (B, T, D), float32 or
    bfloat16; `seeds[t]`: see `subtract_from_rows`; the rest as in `PreparedLookups`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
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
    lr: float,
    eps: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Adagrad with one moment a row, the mean of g^2 over the row: for tables whose moments would not fit.

    `moments[t]`: (rows,) float32; the rest as of `sparse_adagrad_reference`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
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
    lr: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """weight[r] -= lr * g, in place, on the rows that were looked up; arguments as of `sparse_adagrad_reference`."""
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        subtract_from_rows(weights[t], rows, lr * gradient, seeds and seeds[t])


def row_gradients(
    grad_pooled: Tensor, unique_indices: Tensor, output_rows: Tensor, output_row_offsets: Tensor, unique_count: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    """For each table the rows that were looked up, (U,) int64, and the gradient of each, (U, D) float32."""
    for t, unique in enumerate(unique_count.flatten().tolist()):
        by_bag = grad_pooled[:, t].float().contiguous()
        yield unique_indices[t, :unique].long(), sum_bags(by_bag, output_rows[t], output_row_offsets[t, : unique + 1])


def subtract_from_rows(weight: Tensor, rows: Tensor, steps: Tensor, seed: int | None) -> None:
    """weight[rows] -= steps; a bfloat16 weight is `randomly_rounded` if there is a `seed`, else to nearest."""
    values = weight[rows].float() - steps
    if weight.dtype == torch.bfloat16 and seed is not None:
        values = randomly_rounded(values, rows, seed)
    weight[rows] = values.to(weight.dtype)


def randomly_rounded(values: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Values of bfloat16, up or down from `values` (U, D) so that the expected one is the value itself.

    Steps too small for bfloat16's 8 bits then add up instead of vanishing. The random bits are a hash of seed + row,
    and of the column, so they depend on nothing else.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    key = mix(seed + rows)  # (U,)
    random = mix(key[:, None] + columns) & 0xFFFF
    rounded = (values.view(torch.int32) + random.int()) & ~0xFFFF
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def rounding_seeds(update: int, tables: Sequence[int], first_rows: Sequence[int]) -> list[int]:
    """Of the update of this number, for tables, or for what starts at a row of one: the row is rounded as in the whole
    table."""
    return (mix(mix(torch.tensor(update)) + torch.tensor(tables)) + torch.tensor(first_rows)).tolist()


def mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on the low 32 bits of int64 numbers."""
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
    torch._check(len(weights) == len(moments) == len(grads), lambda: "one moment and gradient a weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "a shadow for each weight, or none")


@register_fake("dlrm::dense_sgd_")
def _(weights, grads, shadows, lr) -> None:
    torch._check(len(weights) == len(grads), lambda: "one gradient a weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "a shadow for each weight, or none")


@reference("dlrm::dense_adagrad_")
def dense_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grads: Sequence[Tensor],
    shadows: Sequence[Tensor],
    lr: float,
    eps: float,
) -> None:
    """Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it) on every element, in place:

        moment += g^2;  weight -= lr * g / (sqrt(moment) + eps);  shadow = bfloat16(weight)

    `weights[p]`, `moments[p]`: float32; `grads[p]`: float32 or bfloat16; `shadows[p]`: bfloat16, or no shadows at all.
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
    """weight -= lr * g; shadow = bfloat16(weight), in place; arguments as of `dense_adagrad_reference`."""
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
    return num_features * (num_features + (1 if itself else -1)) // 2


@register_fake("dlrm::dot_interaction")
def _(dense, pooled, itself) -> Tensor:
    batch, tables, dim = pooled.shape
    torch._check(dense.shape == (batch, dim), lambda: f"dense {tuple(dense.shape)}, pooled {tuple(pooled.shape)}")
    return dense.new_empty(batch, dim + num_pairs(tables + 1, itself))


@register_fake("dlrm::dot_interaction_backward")
def _(grad, dense, pooled, itself) -> tuple[Tensor, Tensor]:
    return dense.new_empty(dense.shape), pooled.new_empty(pooled.shape)


@reference("dlrm::dot_interaction")
def dot_interaction_reference(dense: Tensor, pooled: Tensor, itself: bool) -> Tensor:
    """The dense feature, then the dot product of each pair of features: the lower triangle of X X^T, row by row, where
    the rows of X are the dense feature and the pooled ones; with the diagonal if `itself`.

    `dense`: (B, D), `pooled`: (B, T, D), float. Returns (B, D + pairs) in the type of `dense`.
    """
    features = torch.cat([dense[:, None], pooled], dim=1)  # (B, F, D)
    products = torch.bmm(features, features.transpose(1, 2))  # (B, F, F)
    row, column = torch.tril_indices(*products.shape[1:], offset=0 if itself else -1, device=dense.device)
    return torch.cat([dense, products[:, row, column].to(dense.dtype)], dim=1)


@reference("dlrm::dot_interaction_backward")
def dot_interaction_backward_reference(
    grad: Tensor, dense: Tensor, pooled: Tensor, itself: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of X is (G + G^T) X, G that of the triangle. Returns (B, D) and (B, T, D), typed as the inputs."""
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
# Layers
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::relu_backward", "(Tensor grad, Tensor output) -> (Tensor, Tensor, Tensor)")


@register_fake("dlrm::relu_backward")
def _(grad, output) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = output.shape
    return output.new_empty(batch, width), output.new_empty(width, batch), output.new_empty(width)


@reference("dlrm::relu_backward")
def relu_backward_reference(grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of what a ReLU was given, from that of its output: as rows (B, n), as columns (n, B), and its sum
    over the batch (n,), which is the gradient of the bias before the ReLU."""
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
