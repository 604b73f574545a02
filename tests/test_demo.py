"""The launcher, as its users meet it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import demo_dlrm
from dlrm.data import criteo_generator
from dlrm.errors import UsageError
from dlrm.options import Options
from dlrm.system.signals import ANNOUNCEMENT

CONFIGS = sorted(path.stem for path in (ROOT / "hb_configs").glob("*.yaml"))
# The two commands that the first version was used with.
LAZY_BF16 = (
    "--world_size 1 --print-time --print-freq 1 --mode lazy --arch-interaction-op cat --arch-sparse-feature-size 64 "
    "--arch-embedding-size 3000000 --arch-mlp-bot 1024-1024-1024-64 --arch-mlp-top "
    "4096-4096-4096-4096-4096-4096-4096-1 --mini-batch-size 512 --learning-rate 1e-05 --num-batches 100 "
    "--num-indices-per-lookup 38 --optimizer adagrad --data_type bf16"
)
EAGER_FP32 = LAZY_BF16.replace("--mode lazy ", "").replace(" --data_type bf16", "")
TINY = (
    "--arch-embedding-size=30-20 --mini-batch-size=4 --num-batches=3 --arch-sparse-feature-size=4 "
    "--arch-mlp-bot=5-4 --arch-mlp-top=6-1 --print-freq=1"
)


def options_of(*argv: str) -> Options:
    given = demo_dlrm.make_parser().parse_given(argv)
    config = demo_dlrm.read_config(demo_dlrm.find_config(given.pop("config")))
    return Options(**config.given | given)


@pytest.fixture
def input_folder(tmp_path, monkeypatch):
    """Changes to a folder with the click logs that the configurations of data sets read."""
    criteo_generator.generate(str(tmp_path / "input" / "train.txt"), 100)
    (tmp_path / "input" / "day_0").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("input_folder")
@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_is_complete_and_described(name):
    options = options_of("--config", name)
    assert options.print_time
    assert len((ROOT / "hb_configs" / f"{name}.yaml").read_text().splitlines()[0]) > 20
    if options.data_generation != "dataset":  # whose size is the user's
        assert 4 * sum(options.arch_embedding_size) * options.arch_sparse_feature_size * 2 < 16e9


@pytest.mark.parametrize("mode", ["eager", "lazy", "compile"])
@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
def test_medium_configurations_are_the_first_launchers(mode, data_type):
    options = options_of("--config", f"single_node_dlrm_{mode}_medium_{data_type}")
    parser = demo_dlrm.make_parser()
    flags = parser.parse_given(shlex.split(EAGER_FP32)) | {"print_freq": 20, "mode": mode, "data_type": data_type}
    assert options == Options(**flags)


@pytest.mark.usefixtures("input_folder")
@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_trains_when_made_small(name, launcher):
    if name in ("criteo_sample", "criteo_kaggle", "dcnv2_sample", "mlperf_dcnv2"):
        pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    small = "--arch-sparse-feature-size=4 --arch-mlp-bot=13-4 --num-indices-per-lookup=3"
    data = "--data-set=kaggle --raw-data-file=input/train.txt" if name == "mlperf_dcnv2" else ""
    result = launcher(f"--config={name} {TINY} {small} {data}")
    assert result.returncode == 0, result.stderr
    assert "Finished training it 3/3 of epoch 0" in result.stdout
    assert "Report of" in result.stdout


def test_a_configuration_has_lookups_per_table(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: dlrm\nparameters:\n  arch-embedding-size: 9-8-7\n  num-indices-per-lookup: 3-2-1\n")
    assert options_of("--config", str(path)).lookups_per_bag == (3, 2, 1)
    path.write_text("model: dlrm\nparameters:\n  arch-embedding-size: 9-8-7\n  num-indices-per-lookup: 3\n")
    assert options_of("--config", str(path)).lookups_per_bag == (3, 3, 3)


@pytest.mark.parametrize("flags", [LAZY_BF16, EAGER_FP32])
def test_the_first_commands_run_word_for_word(flags, launcher):
    """Where a flag is given twice, the second value counts, so the model is as small as TINY says."""
    result = launcher(f"{flags} {TINY}")
    assert result.returncode == 0, result.stderr
    assert "running on the CPU" in result.stdout
    assert "Finished training it 3/3" in result.stdout


def test_a_dry_run_prints_a_command_that_can_be_pasted(launcher):
    flags = "--config single_node_dlrm_lazy_medium_bf16 --learning-rate 0.5"
    printed = launcher(flags + " --dry-run").stdout
    command = shlex.split(printed)
    assert command[0] == "env"
    assert {"RUN_TPC_FUSER=0", "PT_HPU_LAZY_MODE=1", "TEMP_DIR=/tmp/"} < set(command)
    assert "--learning-rate=0.5" in command
    assert "--arch-mlp-bot=1024-1024-1024-64" in command
    shown = subprocess.run([*shlex.split(printed), "--nonsense"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 2
    assert "unknown flag --nonsense" in shown.stderr


def test_the_command_line_wins_over_the_file_and_the_caller_over_its_environment(launcher):
    environment = os.environ | {"RUN_TPC_FUSER": "1"}
    printed = launcher("--config=single_node_dlrm_eager_medium_fp32 --mode=lazy --dry-run", env=environment).stdout
    assert "--mode=lazy" in printed
    assert "--mode=eager" not in printed
    assert "RUN_TPC_FUSER" not in printed
    assert "PT_HPU_LAZY_MODE=1" in printed


def test_list_configs_names_each_with_a_description(launcher):
    lines = launcher("--list-configs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == CONFIGS
    assert max(map(len, lines)) <= 120


def test_examples_in_help_can_be_run(launcher):
    text = launcher("--help").stdout
    assert text.startswith("usage: python demo_dlrm.py [--flag=value ...]\n\n")
    assert text.index("  --config NAME|PATH ") < text.index("  --device ") < text.index("\nexamples:")
    examples = [line.split()[2:] for line in text.splitlines() if line.startswith("  python demo_dlrm.py ")]
    assert len(examples) == 3
    for flags in examples:
        assert launcher(" ".join([*flags, "--dry-run"])).returncode == 0


@pytest.mark.parametrize("spelling", ["--config", "--hb_config", "--hb-config"])
def test_a_configuration_has_an_old_flag_too(spelling, launcher):
    assert "--arch-mlp-bot=13-256-128-32" in launcher(f"{spelling}=quickstart --dry-run").stdout


GOOD = 'model: "dlrm"\nparameters:\n  learning-rate: 1e-5\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  lerning-rate: 1\n", "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (GOOD + "  mini-batch-size: many\n", "--mini-batch-size: expected an integer from 1 to 2147483647, got 'many'"),
        (GOOD + "  mini-batch-size: [1, 2]\n", "parameters: mini-batch-size: expected one value, got ['1', '2']"),
        (GOOD + "  mini-batch-size:\n    a: 1\n", "parameters: mini-batch-size: expected one value"),
        (GOOD + "  store_true: print-time\n", "store_true: expected a list of flags"),
        (GOOD + "  store_true: [print-tme]\n", "unknown flag --print-tme; did you mean --print-time?"),
        (GOOD + "  launcher: torchrun\n", "unknown flag --launcher"),
        (GOOD + "  store_true: [dry-run]\n", "unknown flag --dry-run"),
        (GOOD + "paramters: {}\n", "unknown key 'paramters'"),
        (GOOD + "env_variables: [A]\n", "env_variables: expected lines of the form key: value"),
        (GOOD + "env_variables: {A: [1]}\n", "env_variables: A: expected a name and a text"),
        ("model: resnet\n", "model must be dlrm, not 'resnet'"),
        ("- 1\n", "expected lines of the form key: value"),
        ("", "expected lines of the form key: value"),
        ("model: dlrm\nparameters: {a\n", "line 3, column 1: expected ',' or '}'"),
        ("model: dlrm\n\tparameters: 1\n", "line 2, column 1"),
        (GOOD + "  learning-rate: 1\n", "line 4, column 3: 'learning-rate' is given twice"),
        (GOOD + "model: dlrm\n", "line 4, column 1: 'model' is given twice"),
        (GOOD + "? [a]\n", "line 4, column 3: a key is no text"),
        (GOOD + "  learning_rate: 1\n", "parameters: --learning-rate is given twice"),
        (GOOD + "  print-time: true\n  store_true: [print-time]\n", "parameters: --print-time is given twice"),
        (GOOD + '  report: "a\\0b"\n', "line 4, column 11: 'a\\x00b' is no text"),
        (GOOD + '  report: "\\ud800"\n', "line 4, column 11: '\\ud800' is no text"),
        (GOOD + "  report: \0\n", "special characters are not allowed"),
        ("[" * 3000, "lists or mappings are nested too deeply"),
        ("model: &a [*a]\n", "line 1, column 8: found unconstructable recursive node"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(text, message, tmp_path, launcher):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    result = launcher(f"--config {path}")
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("text", ["1024-10-10-2", "2024-10-2", "1e-5", "0.5", "010"])
def test_values_reach_the_flags_as_they_are_written(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: dlrm\nparameters:\n  report: {text}\n")
    assert demo_dlrm.read_config(path).given == {"report": text}


def test_an_unknown_configuration_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean quickstart"):
        demo_dlrm.find_config("quikstart")
    with pytest.raises(UsageError, match="--list-configs"):
        demo_dlrm.find_config("/nowhere/zzz")
    assert demo_dlrm.find_config("quickstart") == demo_dlrm.find_config("quickstart.yaml")


def test_wrong_flags_are_answered_by_the_launcher_itself(launcher):
    result = launcher("--config=quickstart --arch-mlp-bot=4-5")
    assert result.returncode == 2
    assert result.stderr.startswith("demo_dlrm.py: error: --arch-mlp-bot ends in 5, but must end in")


def test_the_trainers_exit_status_is_the_launchers(launcher):
    result = launcher(f"{TINY} --loss-function=mse --learning-rate=1e30")
    assert result.returncode == 1
    assert "is nan" in result.stderr


def test_ctrl_c_ends_the_run_cleanly():
    command = [sys.executable, str(ROOT / "demo_dlrm.py"), *TINY.split(), "--num-batches=10000000", "--print-freq=50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("Finished"):
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ANNOUNCEMENT + "dlrm_s_pytorch.py: interrupted\n"
