"""The embedding bags of intel-extension-for-pytorch, which needs a torch of its own and so a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peer_process import PeerProcess

FLAG = "--ipex-python"
STEPS = Path(__file__).with_name("ipex_step.py")


class Peer(PeerProcess):
    """Does a step with IPEX's embedding bags whenever it is told to.

    At the start it checks one update. If that is wrong, the name of the peer says by how much.
    """

    def __init__(self, python: str, module: str, shape: Any):
        numbers = (shape.tables, shape.rows, shape.dim, shape.batch_size, shape.lookups_per_bag)
        super().__init__(FLAG, [python, str(STEPS), module, *map(str, numbers)])
        self.name = f"IPEX {module}"
        if float(self.first_line) > 1e-3:
            self.name += f", wrong by {float(self.first_line):.2g}"
