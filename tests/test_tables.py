"""Quotient-remainder tables, mixed-dimension tables and weighted pooling against the reference script and formulas."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.devices.accelerator import AcceleratorBackend
from dlrm.errors import UsageError
from dlrm.kernels.special_tables import mixed_dimensions, qr_bounds, table_numbers
from dlrm.options import Options
from dlrm_s_pytorch import DLRM_Net, Trainer, select_backend

# Losses that the reference script (facebookresearch/dlrm, commit 090956e) printed with the given flags and torch 2.13.
# "ours": flags that this trainer needs in addition. There are no losses for mixed dimensions with rounding, or beside
# tables below the threshold, because the reference script fails there.
REFERENCE = json.loads(Path(__file__).with_name("reference_losses_tables.json").read_text())


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["flags"].replace("--", ""))
def test_losses_equal_the_reference_script(case, script):
    status, output, _ = script(f"{case['flags']} {case['ours']}")
    assert status == 0
    ours = np.array(re.findall(r"it, loss ([\d.]+)", output), float)
    theirs = np.array(case["losses"].split(), float)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1.5e-6)


def pooled_by_formula(options: Options, weights: dict, t: int, indices: torch.Tensor, offsets: torch.Tensor):
    """Returns the pooled rows of table t, computed bag by bag and row by row, (B, D) float64."""
    bags = []
    row_weights = weights.get(f"v_W_l.{t}", torch.ones(options.arch_embedding_size[t], dtype=torch.float64))
    for begin, end in pairwise(offsets):
        rows = indices[begin:end]

        def weighted_sum(name, places, rows=rows):
            table = weights[f"emb_l.{t}.{name}"]
            return sum((row_weights[i] * table[p] for i, p in zip(rows, places, strict=True)), table.new_zeros(1))

        if f"emb_l.{t}.weight_q" in weights:
            q = weighted_sum("weight_q", rows // options.qr_collisions)
            r = weighted_sum("weight_r", rows % options.qr_collisions)
            bags.append({"mult": q * r, "add": q + r, "concat": torch.cat([q, r])}[options.qr_operation])
        elif f"emb_l.{t}.embs.weight" in weights:
            projection = weights.get(f"emb_l.{t}.proj.weight")
            pooled = weighted_sum("embs.weight", rows)
            bags.append(pooled if projection is None else projection @ pooled)
        else:
            bags.append(weighted_sum("weight", rows))
    return torch.stack(bags)


COMMON = {"mini_batch_size": 5, "num_batches": 1, "arch_embedding_size": (40, 10, 55), "learning_rate": 0.5}
KINDS = [
    {"qr_flag": True, "qr_threshold": 20, "qr_operation": "mult", "qr_collisions": 3},
    {"qr_flag": True, "qr_threshold": 20, "qr_operation": "add", "weighted_pooling": "learned"},
    {"qr_flag": True, "qr_threshold": 20, "qr_operation": "concat", "arch_mlp_bot": (4, 3, 4), "qr_collisions": 60},
    {"md_flag": True, "md_threshold": 20, "arch_sparse_feature_size": 6, "arch_mlp_bot": (4, 6), "md_temperature": 0.5},
    {"weighted_pooling": "learned"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_and_a_step_equal_the_formulas(kind):
    options = Options(**COMMON, **kind)
    trainer = Trainer(open_data_set(options), select_backend(options))
    batch = next(iter(RandomData(options)))
    before = {name: p.detach().double().requires_grad_() for name, p in trainer.model.state_dict().items()}
    prepared = next(trainer.pipeline.run([batch]))

    expected = torch.stack(
        [pooled_by_formula(options, before, t, batch.indices[t], batch.offsets[t]) for t in range(3)], dim=1
    )
    pooled = trainer.model.emb_l(prepared.lookups)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)

    direction = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))
    (pooled * direction).sum().backward()
    (expected * direction).sum().backward()
    trainer.sparse_optimizer.step(prepared.lookups)
    for name, new in trainer.model.state_dict().items():
        if name.startswith(("emb_l", "v_W_l")):
            moved = (before[name].detach() - new.double()) / options.learning_rate
            gradient = before[name].grad
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(moved, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_have_the_names_that_they_have_in_the_reference_script():
    def names(**settings):
        options = Options(arch_embedding_size=(300, 4), **settings)
        return [name for name in DLRM_Net(options, select_backend(options)).state_dict() if "_l." in name[:6]][:5]

    assert names(qr_flag=True)[:3] == ["emb_l.0.weight_q", "emb_l.0.weight_r", "emb_l.1.weight"]
    assert names(md_flag=True)[:3] == ["emb_l.0.embs.weight", "emb_l.0.proj.weight", "emb_l.1.weight"]
    options = Options(weighted_pooling="learned")
    assert {f"v_W_l.{t}" for t in range(3)} < set(DLRM_Net(options, select_backend(options)).state_dict())
    options = Options(weighted_pooling="fixed")
    assert not any("v_W" in name for name in DLRM_Net(options, select_backend(options)).state_dict())


def test_mixed_dimensions():
    def dims(rows, dim=16, **settings):
        return mixed_dimensions(
            Options(
                md_flag=True,
                arch_embedding_size=rows,
                arch_sparse_feature_size=dim,
                arch_mlp_bot=(4, dim),
                **settings,
            )
        )

    assert dims((1000, 300, 2**31 - 1), md_temperature=0.5) == [9, 16, 1]  # 16 sqrt(0.3) = 8.76
    assert dims((1000, 100, 10), md_temperature=0.5) == [
        2,
        16,
        16,
    ]  # n_min is that of all tables; those below the threshold keep 16
    assert dims((1000, 300), md_temperature=0.5, md_round_dims=True) == [8, 16]
    assert dims((300, 300), dim=12, md_round_dims=True) == [
        12,
        12,
    ]  # not 16, which is more than the embedding dimension
    assert dims((1000, 300), md_temperature=0.0) == [16, 16]


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_even_init_gives_composed_rows_the_variance_of_ordinary_rows(operation):
    rows = 300
    low, high = qr_bounds(rows, operation, "even")
    q, r = np.random.default_rng(0).uniform(low, high, (2, 200_000))
    composed = {"mult": q * r, "add": q + r, "concat": np.concatenate([q, r])}[operation]
    assert composed.var() == pytest.approx(1 / (3 * rows), rel=0.02)


@pytest.mark.parametrize("kind", [*KINDS, {}, {"weighted_pooling": "fixed"}], ids=str)
def test_the_memory_check_counts_all_weights_of_the_tables(kind):
    options = Options(**COMMON, **kind)
    model = DLRM_Net(options, select_backend(options))
    learned = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("emb_l", "v_W_l")))
    fixed = sum(COMMON["arch_embedding_size"]) if options.weighted_pooling == "fixed" else 0
    assert table_numbers(options) == learned + fixed


def test_every_row_is_found_although_float32_has_no_room_for_its_number():
    """In float32, (2^25 - 1) / 4 would be rounded up to 2^23, a row past the end of the quotient table."""
    options = Options(arch_embedding_size=(2**25,), qr_flag=True, arch_sparse_feature_size=1, arch_mlp_bot=(4, 1))
    tables = DLRM_Net(options, select_backend(options)).emb_l
    pooled = tables.look_up(0, torch.tensor([2**25 - 1]), torch.tensor([0, 1]))
    torch.testing.assert_close(pooled[0], tables[0].weight_q[-1] * tables[0].weight_r[-1])


@pytest.mark.parametrize(
    "flags", ["--mode=compile", "--data_type=bf16", "--inference-only", "--optimizer=adagrad --optimizer-eps=1e-8"]
)
def test_special_tables_work_with_other_flags(flags, script):
    common = "--mini-batch-size=4 --num-batches=3 --arch-embedding-size=300-20 --weighted-pooling=learned "
    for kind in ("--qr-flag", "--md-flag"):
        status, output, errors = script(common + f"{kind} {flags}")
        assert (status, errors) == (0, "")
        assert output.count("Finished") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qr_flag": True, "md_flag": True}, "--qr-flag and --md-flag exclude each other"),
        ({"qr_flag": True, "qr_operation": "concat"}, "must end in twice --arch-sparse-feature-size, 4"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Options(**settings)


@pytest.mark.parametrize("flag", ["qr_flag", "md_flag", "weighted_pooling"])
def test_other_devices_are_refused(flag):
    options = Options(**{flag: "learned" if flag == "weighted_pooling" else True})
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} works on the CPU alone; use --device=cpu"):
        AcceleratorBackend.__init__(Mock(), torch.device("meta"), options)
