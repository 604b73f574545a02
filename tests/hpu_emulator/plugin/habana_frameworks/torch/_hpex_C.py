"""The custom operators: functions of positional arguments that autograd, autocast and fake tensors do not know.

Results that a Gaudi's kernels leave undefined are NaN here, or 0x7fffffff in tensors of integers.
"""

import functools

import torch
from torch.nn.functional import embedding_bag

from habana_frameworks.torch.utils.internal import is_lazy

UNDEFINED = 0x7FFFFFFF
EPS = 1e-10  # sparse_adagrad's; a caller cannot choose it


def on_host_memory(argument):
    """Returns CPU tensors that share the memory of a tensor or a list of tensors, and other arguments as they are."""
    if isinstance(argument, list):
        return [on_host_memory(element) for element in argument]
    return torch.ops.hpu_emulator.host(argument) if isinstance(argument, torch.Tensor) else argument


def device_op(function):
    """Decorates a function of CPU tensors into an operator of hpu tensors, which works on their memory.

    The operator raises RuntimeError outside of lazy mode. `function` returns a new tensor, the positions of those
    arguments that are the results, or None.
    """
    name = function.__name__

    @functools.wraps(function)
    def op(*arguments):
        if not is_lazy():
            raise RuntimeError(f"Frontend Op {name} not supported with new Eager mode")
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        for tensor in tensors:
            check(name, tensor.device.type == "hpu", f"a tensor on hpu, not on {tensor.device}")
        with torch.no_grad():
            on_host = [on_host_memory(argument) for argument in arguments]
            constants = " ".join(str(argument) for argument in arguments if isinstance(argument, (int, float)))
            torch.ops.hpu_emulator.record(f"hpex::{name}", tensors, constants)
            results = function(*on_host)
            if isinstance(results, torch.Tensor):
                return torch.ops.hpu_emulator.adopt(results)
            return None if results is None else tuple(arguments[position] for position in results)

    return op


def check(name, condition, expected):
    if not condition:
        raise RuntimeError(f"{name} expects {expected}")


def check_rank(name, **ranks):
    for argument, (tensor, rank) in ranks.items():
        check(name, tensor.dim() == rank, f"{argument} of {rank} dimensions, not of shape {tuple(tensor.shape)}")


def check_dtype(name, *dtypes, **tensors):
    for argument, tensor in tensors.items():
        check(name, tensor.dtype in dtypes, f"{argument} of {' or '.join(map(str, dtypes))}, not {tensor.dtype}")


def check_range(name, indices, rows):
    inside = bool(((indices >= 0) & (indices < rows)).all())
    check(name, inside, f"indices from 0 to {rows - 1}")


def sum_bags(name, rows, indices, offsets):
    """Returns the sum over each bag of the `rows` (n, D) at `indices`, (bags, D). `offsets`: (bags + 1,)."""
    starts = offsets.long()
    ordered = int(starts[0]) >= 0 and bool((starts.diff() >= 0).all()) and int(starts[-1]) <= len(indices)
    check(name, ordered, f"offsets that do not decrease, from 0 to {len(indices)} at most")
    used = indices[starts[0] : starts[-1]].long()
    check_range(name, used, len(rows))
    return embedding_bag(used, rows.float(), starts - starts[0], mode="sum", include_last_offset=True).to(rows.dtype)


@device_op
def embedding_bag_sum_fwd(weights, indices, offsets, valid_count, kernel_mode):
    """Returns the sum over each bag: NaN for bags past the valid ones, or that reach past the valid indices."""
    name = "embedding_bag_sum_fwd"
    check(name, kernel_mode in (0, 1, 2), f"a kernel_mode of 0, 1 or 2, not {kernel_mode}")
    check_rank(name, weights=(weights, 2), indices=(indices, 1), offsets=(offsets, 1), valid_count=(valid_count, 1))
    check_dtype(name, torch.float32, torch.bfloat16, weights=weights)
    check_dtype(name, torch.int32, indices=indices, offsets=offsets, valid_count=valid_count)
    out = weights.new_full((len(offsets) - 1, weights.shape[1]), float("nan"))
    short = kernel_mode == 2  # a kernel for short bags
    check(name, not short or len(valid_count) == 1, "in kernel_mode 2 one valid count, as in the plugin's fbgemm.py")
    if kernel_mode == 0:  # a gather, whatever the offsets are
        check(name, len(offsets) == len(indices) + 1, "in kernel_mode 0 as many bags as indices")
        valid = indices[: valid_count[0]].long()
        check_range(name, valid, len(weights))
        out[: len(valid)] = weights[valid]
        return out
    bags = int(valid_count[0]) - 1
    check(name, 0 <= bags <= len(out), f"up to {len(out)} valid bags, not {bags}")
    out[:bags] = sum_bags(name, weights, indices, offsets[: bags + 1])
    if len(valid_count) > 1:
        out[:bags][offsets[1 : bags + 1] > valid_count[1]] = float("nan")
    return out


@device_op
def embedding_bag_sum_bwd(out, grad, indices_bwd, offsets_bwd, valid_count_bwd, kernel_mode):
    """Writes the sum over each bag of rows of `grad` to `out`, in every kernel_mode. Other rows of `out` become NaN."""
    name = "embedding_bag_sum_bwd"
    check(name, kernel_mode in (0, 1, 2), f"a kernel_mode of 0, 1 or 2, not {kernel_mode}")
    check_rank(name, out=(out, 2), grad=(grad, 2), indices_bwd=(indices_bwd, 1), offsets_bwd=(offsets_bwd, 1))
    check(name, valid_count_bwd.numel() == 2, "two valid counts")
    check_dtype(name, torch.float32, torch.bfloat16, out=out, grad=grad)
    check_dtype(name, torch.int32, indices=indices_bwd, offsets=offsets_bwd, valid_count=valid_count_bwd)
    rows = int(valid_count_bwd[0]) - 1
    check(name, 0 <= rows <= min(len(out), len(offsets_bwd) - 1), f"no more valid rows than out has, not {rows}")
    sums = sum_bags(name, grad, indices_bwd, offsets_bwd[: rows + 1])
    out.fill_(float("nan"))
    out[:rows] = sums
    return (0,)


def embedding_bag_preproc(indices, offsets, embedding_table_len):
    """Groups lookups by row, on the host, in every mode.

    Sorts by as many bits, 11 at a time, as `embedding_table_len` has. Returns the number of rows, the rows, the bag of
    each lookup, and the start of each row's group.
    """
    name = "embedding_bag_preproc"
    check_dtype(name, torch.int32, indices=indices, offsets=offsets)
    for tensor in (indices, offsets):
        check(name, tensor.is_cpu and tensor.dim() == 1 and tensor.is_contiguous(), "contiguous vectors on the CPU")
    count = len(indices)
    position = torch.arange(count, dtype=torch.int32)
    inside = (position >= offsets[0]) & (position < offsets[-1])
    keys = torch.where(inside, indices, 0)
    bags = torch.where(inside, torch.searchsorted(offsets, position, right=True, out_int32=True) - 1, 0)
    if passes := -(-int(embedding_table_len).bit_length() // 11):
        order = (keys & ((1 << min(11 * passes, 31)) - 1)).argsort(stable=True)
        keys, bags = keys[order], bags[order]
    unique, lengths = keys.unique_consecutive(return_counts=True)
    unique_indices = torch.full((count,), UNDEFINED, dtype=torch.int32)
    row_offsets = torch.full((count + 1,), UNDEFINED, dtype=torch.int32)
    unique_indices[: len(unique)] = unique
    row_offsets[0] = 0
    row_offsets[1 : len(unique) + 1] = lengths.cumsum(0)
    return torch.tensor([len(unique)]), unique_indices, bags.int(), row_offsets


def updated_rows(name, grads, weights, moments, indices, lr, valid_count):
    """Checks the arguments of a sparse optimizer. Returns the rows to update, (U,), and their gradients, (U, D)."""
    check_rank(name, grads=(grads, 2), weights=(weights, 2), moments=(moments, 2), indices=(indices, 1))
    check_dtype(name, torch.float32, torch.float16, torch.bfloat16, grads=grads)
    check_dtype(name, torch.float32, weights=weights, moments=moments, lr=lr)
    check_dtype(name, torch.int32, indices=indices, valid_count=valid_count)
    check(name, weights.shape == moments.shape and grads.shape[1] == weights.shape[1], "weights and moments alike")
    check(name, lr.shape == (1,) and valid_count.shape == (1,), "lr and valid_count of one element")
    count = int(valid_count)
    check(name, 0 <= count <= min(len(grads), len(indices)), f"no more valid rows than gradients, not {count}")
    rows = indices[:count].long()
    check_range(name, rows, len(weights))
    check(name, len(rows.unique()) == count, "each row only once")
    return rows, grads[:count].float()


@device_op
def sparse_adagrad_with_valid_count(grads, weights, moments, indices, lr, valid_count):
    rows, gradient = updated_rows("sparse_adagrad_with_valid_count", grads, weights, moments, indices, lr, valid_count)
    moments[rows] += gradient.square()
    weights[rows] -= lr * gradient / (moments[rows].sqrt() + EPS)
    return 1, 2


def sparse_sgd_with_valid_count(*arguments):
    """Calls the operator between two marks of steps, as the plugin does."""
    from habana_frameworks.torch.core import mark_step

    mark_step()
    result = _sparse_sgd_with_valid_count(*arguments)
    mark_step()
    return result


@device_op
def _sparse_sgd_with_valid_count(grads, weights, moments, indices, lr, valid_count):
    """Writes NaN: the plugin's source says that its kernel gives wrong results, without saying which."""
    rows, _ = updated_rows("sparse_sgd_with_valid_count", grads, weights, moments, indices, lr, valid_count)
    weights[rows] = float("nan")
    return 1, 2


@device_op
def fused_adagrad(grads, weights, variances, step_t, lr_t, weight_decay, lr_decay, eps):
    name = "fused_adagrad"
    check(name, len(grads) == len(weights) == len(variances), "one gradient and one variance per weight")
    check_dtype(name, torch.int32, step_t=step_t)
    check_dtype(name, torch.float32, lr_t=lr_t)
    for grad, weight, variance in zip(grads, weights, variances, strict=True):
        check_dtype(name, torch.float32, torch.bfloat16, grad=grad, weight=weight, variance=variance)
        check(name, grad.shape == weight.shape == variance.shape, "a gradient and a variance of the weight's shape")
        gradient = grad + weight_decay * weight
        variance += gradient.square()
        weight -= lr_t / (1 + (step_t - 1) * lr_decay) * gradient / (variance.sqrt() + eps)
