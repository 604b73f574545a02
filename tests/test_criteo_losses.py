"""Losses on a data set, against those that the reference script printed on the same text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dlrm.data.criteo_generator import generate

# Losses of full batches that facebookresearch/dlrm (commit 090956e) printed with FLAGS on the text of
# `generate(..., samples=1400)`, with torch 2.13 on an AMD EPYC with AVX2.
REFERENCE = json.loads(Path(__file__).with_name("reference_losses_criteo.json").read_text())
FLAGS = (
    "--data-generation=dataset --data-set=kaggle --max-ind-range=1000 --arch-sparse-feature-size=8 "
    "--arch-mlp-bot=13-16-8 --arch-mlp-top=16-1 --mini-batch-size=64 --print-freq=6 --test-freq=12 --learning-rate=0.1 "
    "--loss-function=bce --round-targets=True "
)


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case['order']}-{case['seed']}")
def test_losses_on_a_data_set_equal_the_reference_scripts(case, script, tmp_path):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    generate(str(tmp_path / "train.txt"), 1400)
    order = f"--data-randomize={case['order']} --numpy-rand-seed={case['seed']}"
    status, output, errors = script(f"{FLAGS} --raw-data-file={tmp_path / 'train.txt'} {order}")
    assert status == 0, errors
    ours = re.findall(r"training it .*, loss ([\d.]+)", output)
    np.testing.assert_allclose(np.array(ours, float), np.array(case["losses"].split(), float), rtol=0, atol=1.5e-6)
