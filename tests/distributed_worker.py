"""Trains one case after the other, as one rank of a test, and saves the results of rank 0.

python distributed_worker.py CASES.json RESULTS.pt     under torchrun or mpirun
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dlrm.checkpoint import checkpoint
from dlrm.data.data_set import open_data_set
from dlrm.distributed.launch import find_launch
from dlrm.distributed.placement import make_plan
from dlrm.distributed.ranks import ManyRanks
from dlrm.distributed.rendezvous import join_ranks
from dlrm.options import OptionParser, Options
from dlrm.output.plots import Observer
from dlrm_s_pytorch import Trainer, select_backend


def options_of(flags: str) -> Options:
    """Returns the options that a line of flags gives."""
    return Options(**OptionParser(prog="test").parse_given(flags.split()))


class Scores(Observer):
    """Collects the scores of the test batches."""

    def __init__(self):
        self.found = []

    def observe(self, step: int, values: dict[str, float]) -> None:
        self.found += [value for name, value in values.items() if name in ("Test/Acc", "Test/AUC", "Test/Loss")]


def train(options: Options, ranks=None) -> dict:
    """Trains one case. Returns its losses, printed lines and scores, and on rank 0 all weights and moments."""
    observer = Scores()
    trainer = Trainer(open_data_set(options), select_backend(options), ranks, observer)
    ranks = trainer.ranks
    with contextlib.redirect_stdout(io.StringIO()) as output:
        checkpoint.load(trainer, options)
        trainer.run()
    state = {} if options.inference_only else trainer.sparse_optimizer.state
    moments = [state[weight]["sum"] for weight in trainer.model.emb_l.weights if "sum" in state.get(weight, ())]
    return {
        "losses": [float(loss) for loss in re.findall(r"it, loss ([\d.]+)", output.getvalue())],
        "lines": output.getvalue(),
        "scores": observer.found,
        "weights": ranks.whole_state(trainer.model.state_dict()),
        "moments": ranks.whole_tables(moments) if moments else [],
        "plan": str(ranks.plan),
    }


def main(cases_file: str, results_file: str) -> None:
    cases = [options_of(flags) for flags in json.loads(Path(cases_file).read_text())]
    backend, results = select_backend(cases[0]), []
    with join_ranks(open_data_set(cases[0]), find_launch(), backend) as ranks:
        for options in cases:
            if ranks.size > 1:
                plan = make_plan(options, ranks.size)
                results.append(train(options, ManyRanks(options, ranks.launch, plan, backend, ranks.host)))
            else:
                results.append(train(options))
    if ranks.rank == 0:
        torch.save(results, results_file, pickle_protocol=2)  # which a Gaudi's lazy mode would not choose


if __name__ == "__main__":
    main(*sys.argv[1:])
