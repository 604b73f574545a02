"""Tests of the ONNX export, which onnxruntime computes as the model does, and of the drawing of the compute graph."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import stat

import numpy as np
import pytest
import torch

from dlrm.batch import Batch
from dlrm.data.data_set import open_data_set
from dlrm.kernels.static_embedding import StaticEmbeddingBags
from dlrm.options import Options
from dlrm.output import export
from dlrm.output.export import compute_graph, example_inputs, plain_copy, plot_compute_graph, save_onnx
from dlrm_s_pytorch import DLRM_Net, Trainer, select_backend

KINDS = {
    "dot": {"arch_interaction_itself": True},
    "dcn": {"arch_interaction_op": "dcn", "dcn_num_layers": 2, "dcn_low_rank_dim": 3},
    "cat": {"arch_interaction_op": "cat", "loss_threshold": 0.45, "data_type": "bf16"},
    "qr": {"qr_flag": True, "qr_threshold": 20, "weighted_pooling": "learned"},
    "md": {"md_flag": True, "md_threshold": 20, "arch_sparse_feature_size": 8, "arch_mlp_bot": (4, 5, 8)},
}


def trainer_of(kind: str, **settings) -> Trainer:
    """Returns a trainer whose small model of this kind has been trained for a few steps."""
    common = {"mini_batch_size": 6, "num_batches": 4, "learning_rate": 0.5, "arch_embedding_size": (40, 9, 70)}
    options = Options(**common | KINDS[kind] | settings)
    trainer = Trainer(open_data_set(options), select_backend(options))
    trainer.run()
    return trainer


def batch_of(lengths: list[list[int]], rows: tuple[int, ...] = (40, 9, 70)) -> Batch:
    """Returns a batch of bags of these lengths, which are one list per table, in tables of so many `rows`."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        dense=torch.rand(len(lengths[0]), 4, generator=generator),
        indices=[torch.randint(n, (sum(bags),), generator=generator) for n, bags in zip(rows, lengths, strict=True)],
        offsets=torch.tensor([[0, *np.cumsum(bags)] for bags in lengths]),
        target=torch.zeros(len(lengths[0]), 1),
    )


BATCHES = {
    "as in training": batch_of([[3, 1, 10, 2, 2, 9], [1] * 6, [7, 7, 7, 1, 1, 1]]),
    "empty bags": batch_of([[0, 0, 10, 0, 2, 0], [0] * 6, [0, 7, 7, 1, 0, 0]]),
    "one sample": batch_of([[3], [0], [1]]),
    "many samples": batch_of([[2] * 300, [1] * 300, [0, 3] * 150]),
}


def model_output(trainer: Trainer, batch: Batch) -> np.ndarray:
    """Returns the click probabilities of the trainer's model in float32, for a batch of any size."""
    options = dataclasses.replace(
        trainer.options, data_type="fp32", mini_batch_size=len(batch.target), num_indices_per_lookup=(300,)
    )
    fp32_trainer = Trainer(open_data_set(options), select_backend(options))
    fp32_trainer.model.load_state_dict(trainer.model.state_dict())
    prepared = next(fp32_trainer.pipeline.run([batch]))
    with torch.no_grad():
        return fp32_trainer.model(prepared.dense, prepared.lookups).numpy()


def onnx_output(path, batch: Batch) -> np.ndarray:
    """Returns the click probabilities of the exported model, whose inputs and output must have the documented names."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {"dense_x": batch.dense, "offsets": batch.offsets[:, :-1].contiguous()}
    inputs |= {f"indices_{table}": rows for table, rows in enumerate(batch.indices)}
    assert [tensor.name for tensor in session.get_inputs()] == list(inputs)
    assert [tensor.name for tensor in session.get_outputs()] == ["pred"]
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


@pytest.fixture
def needs_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.usefixtures("needs_onnx")
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_what_the_model_computes(kind, tmp_path):
    import onnx

    if kind == "qr" and torch.__version__.startswith(("2.5.", "2.7.")):
        pytest.skip("torch.export of 2.5 and 2.7 refuses that such a table has any number of lookups")
    trainer = trainer_of(kind, output_folder=str(tmp_path))
    path = save_onnx(trainer.model, trainer.options)
    assert [file.name for file in tmp_path.iterdir()] == ["dlrm_s_pytorch.onnx"]
    onnx.checker.check_model(path, full_check=True)
    for name, batch in BATCHES.items():
        expected = model_output(trainer, batch)
        np.testing.assert_allclose(onnx_output(path, batch), expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("needs_onnx")
def test_weights_too_large_for_one_file_are_in_a_second_one(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_EMBEDDED_BYTES", 400)
    trainer = trainer_of("dot", arch_embedding_size=(4000, 9, 70), output_folder=str(tmp_path))
    path = save_onnx(trainer.model, trainer.options)
    assert {file.name for file in tmp_path.iterdir()} == {"dlrm_s_pytorch.onnx", "dlrm_s_pytorch.onnx.data"}
    assert (tmp_path / "dlrm_s_pytorch.onnx.data").stat().st_size >= 4000 * 2 * 4
    batch = BATCHES["as in training"]
    np.testing.assert_allclose(onnx_output(path, batch), model_output(trainer, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("needs_onnx")
def test_the_flag_exports_the_trained_model(script, tmp_path):
    pytest.importorskip("onnxruntime")
    status, output, errors = script(f"--mini-batch-size=4 --num-batches=3 --save-onnx --output-folder={tmp_path}")
    assert (status, errors) == (0, "")
    assert output.rstrip().endswith(f"Model exported to {tmp_path}/dlrm_s_pytorch.onnx")


def test_missing_packages_are_named(script, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find_spec(name))
    status, output, errors = script("--save-onnx")
    assert status == 2
    assert "--save-onnx needs onnx and onnxscript: pip install onnx onnxscript\n" in errors
    assert "Finished" not in output


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_equals_the_model(kind):
    trainer = trainer_of(kind)
    plain = plain_copy(trainer.model, trainer.options)
    for name, batch in BATCHES.items():
        output = plain(batch.dense, batch.offsets[:, :-1], batch.indices).detach().numpy()
        np.testing.assert_allclose(output, model_output(trainer, batch), rtol=1e-5, atol=1e-6, err_msg=name)


def test_who_changes_the_forward_pass_changes_the_exports(monkeypatch):
    trainer = trainer_of(next(iter(KINDS)))
    inputs = example_inputs(trainer.options)
    before, predict = plain_copy(trainer.model, trainer.options)(*inputs), DLRM_Net.predict
    monkeypatch.setattr(DLRM_Net, "predict", lambda self, *arguments: predict(self, *arguments) / 2)
    torch.testing.assert_close(plain_copy(trainer.model, trainer.options)(*inputs), before / 2)


def test_static_tables_are_exported_like_ordinary_ones():
    options = Options()
    model = DLRM_Net(options, select_backend(options))
    plain = plain_copy(model, options)
    model.emb_l = StaticEmbeddingBags([table.weight.data for table in model.emb_l])
    static = plain_copy(model, options)
    inputs = example_inputs(options)
    torch.testing.assert_close(static(*inputs), plain(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_holds_every_table_and_layer(kind):
    trainer = trainer_of(kind)
    text = compute_graph(trainer.model, trainer.options)
    labels = dict(re.findall(r'"(\w+)" \[label="([^"]*)"', text))
    names = {node: label.split("\\n")[0] for node, label in labels.items()}
    edges = {(names[source], names[target]) for source, target in re.findall(r'"(\w+)" -> "(\w+)"', text)}
    for number in range(3):
        table = f"emb_l.{number}"
        assert {(f"indices_{number}", table), (f"offsets_{number}", table), (table, "interaction")} <= edges
    assert {
        ("dense_x", "bot_l.0"),
        ("bot_l.2", "interaction"),
        ("interaction", "cross_l.0" if kind == "dcn" else "top_l.0"),
        ("cross_l.1" if kind == "dcn" else "interaction", "top_l.0"),
        ("top_l.0", "top_l.2"),
    } < edges
    assert any(target == "output" for _, target in edges)
    for name, parameter in trainer.model.named_parameters():
        if "v_W" not in name:
            assert " x ".join(map(str, parameter.shape)) in text


def test_the_graph_is_drawn_if_graphviz_is_installed(script, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    flags = f"--plot-compute-graph --output-folder={tmp_path}"
    assert f"Compute graph drawn to {tmp_path}/dlrm_s_pytorch_graph.dot\n" in script(flags)[1]
    assert [file.name for file in tmp_path.iterdir()] == ["dlrm_s_pytorch_graph.dot"]

    monkeypatch.undo()
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_in = tools / "dot"  # stands in for Graphviz, and takes the same arguments
    stand_in.write_text('#!/bin/sh\nout=${2#-o}; [ "$1" = -Tsvg ] && grep -q digraph "$3" && echo "<svg/>" > "$out"\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    status, output, _ = script(flags)
    assert status == 0
    assert "dlrm_s_pytorch_graph.svg" in output
    assert (tmp_path / "dlrm_s_pytorch_graph.svg").read_text() == "<svg/>\n"
    stand_in.write_text("#!/bin/sh\necho out of ink >&2; exit 1\n")
    status, _, errors = script(flags)
    assert status == 1
    assert "out of ink" in errors


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
def test_graphviz_draws_the_graph(tmp_path):
    options = Options(output_folder=str(tmp_path))
    drawing = plot_compute_graph(DLRM_Net(options, select_backend(options)), options)[1]
    assert "emb_l.2" in drawing.read_text()


@pytest.mark.parametrize("flag", ["--save-onnx", "--plot-compute-graph"])
def test_a_missing_folder_is_refused_before_training(flag, script):
    if flag == "--save-onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    status, output, errors = script(f"{flag} --output-folder=/nowhere")
    assert status == 2
    assert f"{flag}: cannot write '/nowhere/dlrm_s_pytorch" in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output
