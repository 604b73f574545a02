"""Random damage to checkpoints, for tests that every checkpoint loads as it was saved, or is refused in one line."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

WRONG_VALUES = (
    None, "text", b"bytes", True, -1, 10**9, 2**70, 0.5, -0.5, math.nan, math.inf, (), (1,), [], [[]], {}, {"a": 1},
    {1: 2}, torch.zeros(2), torch.zeros(()), torch.ones(3, 3, dtype=torch.int64), torch.zeros(3, 3).to_sparse(),
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields, for each part of nested plain data, the keys that lead to it."""
    if path:
        yield path
    keys = range(len(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """Returns a copy of nested plain data in which `change` was applied to the container and key of one part."""
    if len(path) > 1:
        part = changed(value[path[0]], path[1:], change)
    container = list(value) if isinstance(value, tuple) else copy.copy(value)
    if len(path) > 1:
        container[path[0]] = part
    else:
        change(container, path[0])
    return type(value)(container) if isinstance(value, tuple) else container


def delete(container: Any, key: Any) -> None:
    del container[key]


def replace(new: Any, container: Any, key: Any) -> None:
    container[key] = new


def mutated_values(state: dict, generator: random.Random, count: int) -> Iterator[tuple[str, dict]]:
    """Yields a description and a copy of `state` with one part replaced or left out, `count` times.

    Parts near the root, of which there are few, are as likely as those far from it.
    """
    by_depth = {}
    for path in places(state):
        by_depth.setdefault(len(path), []).append(path)
    for _ in range(count):
        path = generator.choice(by_depth[generator.choice(sorted(by_depth))])
        number = generator.randrange(-3, len(WRONG_VALUES))
        if number < 0:
            yield f"without {path}", changed(state, path, delete)
        else:
            wrong = WRONG_VALUES[number]
            yield (
                f"{path} = {wrong!r}",
                changed(state, path, lambda container, key, wrong=wrong: container.__setitem__(key, wrong)),
            )


def damaged_bytes(content: bytes, generator: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields a description and a copy of `content` with a byte changed or the end cut off, `count` times."""
    for number in range(count):
        position = generator.randrange(len(content))
        if number % 4 == 0:
            yield f"cut at {position}", content[:position]
        else:
            value = content[position] ^ generator.randrange(1, 256)
            yield f"byte {position} = {value}", content[:position] + bytes([value]) + content[position + 1 :]
