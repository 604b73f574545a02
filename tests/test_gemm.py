"""The choice among torch's matrix products. test_dense_kernels.py shows that each of them is right."""

from __future__ import annotations

import json

import pytest

from dlrm.kernels import gemm
from dlrm.kernels.gemm import PRODUCTS, Products, fp32_products

LARGE = (512, 1024, 1024)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The shapes that `fastest` is called with, while a stand-in for it finds oneDNN faster for the output alone."""
    calls = []

    def fastest(*shape: int) -> dict[str, str]:
        calls.append(shape)
        return {"output": "onednn", "input_gradient": "default", "weight_gradient": "default"}

    monkeypatch.setenv("DLRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemm, "fastest", fastest)
    new_process()
    yield calls
    new_process()


def new_process() -> None:
    """Forgets what a new process would not know."""
    gemm.kept_choice.cache_clear()


def test_a_large_layer_is_timed_once_per_machine(timed, tmp_path, capsys):
    mixed = PRODUCTS["default"]._replace(output=PRODUCTS["onednn"].output)
    assert fp32_products("auto", *LARGE) == mixed
    assert capsys.readouterr().err == "Timing the matrix products of layers 512 x 1024 -> 1024 (once)...\n"
    new_process()
    assert fp32_products("auto", *LARGE) == mixed
    assert capsys.readouterr().err == ""
    assert timed == [LARGE]
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".json", ".lock"}


def test_another_number_of_threads_is_timed_anew(timed, monkeypatch):
    fp32_products("auto", *LARGE)
    new_process()
    monkeypatch.setattr(gemm.torch, "get_num_threads", lambda: 77)
    fp32_products("auto", *LARGE)
    assert timed == [LARGE, LARGE]


def test_small_layers_and_named_products_are_not_timed(timed):
    assert fp32_products("auto", 128, 64, 64) == PRODUCTS["default"]
    assert [fp32_products(name, *LARGE) for name in PRODUCTS] == list(PRODUCTS.values())
    assert timed == []


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "7", json.dumps({"512 x 1024 -> 1024": {"output": "onednn"}}),
     json.dumps({"512 x 1024 -> 1024": dict.fromkeys(Products._fields, "magic")})],
)  # fmt: skip
def test_a_damaged_file_is_replaced(timed, tmp_path, damage):
    chosen = fp32_products("auto", *LARGE)
    (path,) = (tmp_path / "cache").glob("*.json")
    path.write_text(damage)
    new_process()
    assert fp32_products("auto", *LARGE) == chosen
    assert timed == [LARGE, LARGE]


def test_a_choice_that_cannot_be_kept_is_the_default(timed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DLRM_CACHE", str(tmp_path / "file" / "cache"))
    assert fp32_products("auto", *LARGE) == PRODUCTS["default"]
    assert timed == []


def test_only_a_clearly_faster_product_replaces_the_default(monkeypatch):
    seconds = iter([
        {"default": 1.0, "onednn": 0.95, "native": 0.92},
        {"default": 1.0, "onednn": 0.5, "native": 0.6},
        {"default": 1.0, "onednn": 2.0, "native": 0.8},
    ])  # fmt: skip
    monkeypatch.setattr(gemm, "least_seconds", lambda calls: next(seconds))
    assert gemm.fastest(8, 4, 2) == {
        "output": "default", "input_gradient": "onednn", "weight_gradient": "native"
    }  # fmt: skip


def test_each_product_of_each_candidate_is_timed(monkeypatch):
    timed = []
    monkeypatch.setattr(gemm, "least_seconds", lambda calls: timed.append([call() for call in calls.values()]) or
                        dict.fromkeys(calls, 1.0))  # fmt: skip
    gemm.fastest(8, 4, 2)
    sizes = [[tuple(result.shape) for result in results] for results in timed]
    assert sizes == [[size] * len(PRODUCTS) for size in ((8, 2), (8, 4), (2, 4))]


def test_the_fastest_of_several_calls_counts(monkeypatch):
    clock = iter([0, 5, 5, 6, 6, 8, 8, 9] + [9, 19] * 4)
    monkeypatch.setattr(gemm.time, "perf_counter", lambda: next(clock))
    assert gemm.least_seconds({"a": int}) == {"a": 1}


def test_losses_do_not_depend_on_the_products(script):
    flags = "--mini-batch-size=16 --num-batches=20 --arch-mlp-bot=4-16-2 --arch-mlp-top=16-16-1 --device=cpu"
    outputs = [script(f"{flags} --gemm={name}")[1].splitlines()[-1] for name in PRODUCTS]
    assert outputs == [outputs[0]] * len(PRODUCTS)


def test_the_report_counts_products_by_what_computes_them(script, tmp_path):
    flags = "--mini-batch-size=16 --num-batches=2 --device=cpu --print-time --gemm=native"
    output = script(f"{flags} --report={tmp_path / 'report.json'}")[1]
    assert "  products    15 native\n" in output
    assert json.loads((tmp_path / "report.json").read_text())["products"] == {"default": 0, "onednn": 0, "native": 15}
