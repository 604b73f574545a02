"""Runs the programs with random flags and configurations, right and wrong ones.

    python -m tests.stress.fuzz --count=2000

Each must end with status 0, or with 1 or 2 and one line that says why. What is valid is a run of at most a few batches.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import tempfile
from pathlib import Path

import demo_dlrm
import dlrm_s_pytorch
from dlrm.options import Options, flag
from tests.stress.forked import Tally, run, stress

VALUES = {
    int: ["0", "1", "2", "3", "7", "-1", "64", str(2**31 - 1), str(2**31), str(10**20), "1e3", "x", "", "0x10"],
    float: ["0", "0.5", "1", "-1", "1e-5", "1e30", "nan", "inf", "-inf", "1e400", "x", "", "0,5"],
    bool: ["true", "false", "1", "0", "yes", "maybe", ""],
    str: ["x", "", "/", "/dev/null", "/dev/full", "/nowhere/x", "a\nb", "\u00fc", "\udcff", "..", "~", "%s", "y" * 300],
    tuple: ["1", "3-2", "3-2-1", "5-4-2", "4-1", "0", "-", "1-", "a-b", "1-99999999999", "1000000-1000000", "0.3-1.7"],
}
ANYTHING = ["--", "-", "--x", "=", "x", "--help=1", "-w", "-d", "--=", "-" * 50]
# Flags that make a run long, that only print, or that start other programs.
LEFT_OUT = {"world_size", "device", "num_batches", "nepochs", "data_size"}
SHORT = ["--device=cpu", "--num-batches=2", "--mini-batch-size=3", "--arch-embedding-size=30-20"]
YAML = [
    "model: dlrm", "model: x", "parameters:", "  {name}: {value}", "  {name}: [{value}]", "  store_true: [{name}]",
    "env_variables:", "  A: 1", "  A=B: 2", "{value}", "- a", "\t", "? a", "&a [*a]", "!!python/object:os.system x",
]  # fmt: skip


def random_flags(generator: random.Random) -> list[str]:
    """Returns up to six flags of the trainer with random values, and now and then something else."""
    fields = [field for field in dataclasses.fields(Options) if field.name not in LEFT_OUT]
    flags = []
    for field in generator.choices(fields, k=generator.randrange(7)):
        name, value = flag(field.name), random_value(generator, type(field.default))
        flags.append(
            generator.choice([f"{name}={value}", f"{name}={value}", f"{name.replace('-', '_')}={value}", name])
        )
    if generator.random() < 0.2:
        flags.insert(generator.randrange(len(flags) + 1), generator.choice(ANYTHING))
    return flags


def random_value(generator: random.Random, kind: type) -> str:
    """Returns a value that suits a flag of this type, as a rule."""
    if generator.random() < 0.1:
        kind = generator.choice(list(VALUES))
    return generator.choice(VALUES[kind])


def random_config(generator: random.Random) -> bytes:
    """Returns the content of a configuration file, most of whose lines make sense."""
    fields = dataclasses.fields(Options)
    lines = ["model: dlrm", "parameters:"] if generator.random() < 0.8 else []
    for line in generator.choices(YAML, k=generator.randrange(6)):
        field = generator.choice(fields)
        value = random_value(generator, type(field.default)).encode(errors="replace").decode()
        lines.append(line.replace("{name}", flag(field.name)[2:]).replace("{value}", value))
    content = "\n".join(lines).encode()
    if generator.random() < 0.1:
        position = generator.randrange(len(content) + 1)
        content = content[:position] + generator.randbytes(3) + content[position:]
    return content


def attack(count: int, generator: random.Random, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for _ in range(count):
            if generator.random() < 0.4:
                Path("mine.yaml").write_bytes(random_config(generator))
                main, flags = demo_dlrm.main, ["--config=mine.yaml", *random_flags(generator), "--dry-run"]
                case = f"{flags} {Path('mine.yaml').read_bytes()!r}"
            else:
                main, flags = dlrm_s_pytorch.main, [*random_flags(generator), *SHORT]
                case = str(flags)
            tally.note(case, run(main, flags).fault)


if __name__ == "__main__":
    sys.exit(stress(__doc__.splitlines()[0], 2000, attack))
