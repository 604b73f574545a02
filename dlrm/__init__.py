"""Everything that the three programs on top are made of, by subject.

    errors.py              the errors that end a run with one line
    system/                files, memory and signals of the host; how programs end
    options.py             every flag, declared once
    batch.py               a raw batch, its parts per rank, several batches as one
    kernels/               what a step computes: the ops, and the modules and optimizers made of them; csrc/ is C++
    devices/               what the training loop asks of a device; the CPU and CUDA GPUs
    data/                  random data, traces, the Criteo data sets
    pipeline.py            the host's part of a step
    distributed/           starting ranks, placing tables on them, exchanging lookups and gradients
    checkpoint/            checkpoints of one rank (a file) and of several (a folder)
    output/                report, profile, plots, exported models, MLPerf's log
    evaluation.py          scores and the lines that tests print
    self_test.py           the checks of `demo_dlrm.py --self-test`

A file imports from its own folder, or from what stands to the left of it here:

    errors, system < options, batch < kernels < devices < data < pipeline < distributed < checkpoint, output, evaluation

The programs (`dlrm_s_pytorch.py`, `demo_dlrm.py`, `self_test.py`, and `dlrm_habana_kernels.py`, which has the Gaudi's
back end) may import all of it, and nothing imports a program. `tests/test_layout.py` reads the imports.

Nothing is imported here: the environment must be set before torch, and a Gaudi plugin that loads with torch, come in.
"""
