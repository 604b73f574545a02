"""Flags: which are accepted, how the others are refused, and how --help presents them."""

from __future__ import annotations

import dataclasses
import re
import shlex

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dlrm.errors import UsageError
from dlrm.options import NEEDED_VALUES, OptionParser, Options, flag, flags_without_effect, to_argv


def parse(*argv: str) -> Options:
    return Options(**OptionParser(prog="test").parse_given(argv))


def test_defaults_are_those_of_the_habana_launcher():
    options = parse()
    assert (options.arch_interaction_op, options.loss_function, options.mini_batch_size) == ("dot", "bce", 1)
    assert (options.learning_rate, options.print_freq, options.data_size) == (0.01, 1, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch-mlp-bot=4-x-2"], "--arch-mlp-bot: expected positive integers joined by dashes"),
        (["--arch-mlp-bot="], "--arch-mlp-bot: expected positive integers"),
        (["--arch-mlp-bot=4-0-2"], "--arch-mlp-bot: expected every size from 1"),
        (["--arch-embedding-size=0"], "--arch-embedding-size: expected every size from 1"),
        (["--arch-embedding-size=4--3"], "--arch-embedding-size: expected positive integers"),
        (["--arch-embedding-size=9999999999"], "--arch-embedding-size: expected every size from 1 to 2147483647"),
        (["--arch-mlp-bot=4-3"], "--arch-mlp-bot ends in 3, but must end in --arch-sparse-feature-size, 2"),
        (["--arch-mlp-top=4-2"], "--arch-mlp-top ends in 2, but must end in 1"),
        (["--num-indices-per-lookup=0"], "--num-indices-per-lookup: expected every size from 1"),
        (
            ["--num-indices-per-lookup=3-2"],
            "--num-indices-per-lookup has 2 numbers, but --arch-embedding-size has 3; give",
        ),
        (
            ["--num-indices-per-lookup=1-1-999999999", "--mini-batch-size=8"],
            "--mini-batch-size=8 and --num-indices-per-lookup=1-1-999999999 make more than 2147483647 lookups in all",
        ),
        (["--learning-rate=nan"], "--learning-rate: expected a finite number of at least 0, got 'nan'"),
        (["--learning-rate=-1"], "--learning-rate: expected a finite number of at least 0"),
        (["--learning-rate", "fast"], "--learning-rate: expected a finite number"),
        (["--arch-interaction-op=sum"], "--arch-interaction-op: expected one of dot, cat, dcn, got 'sum'"),
        (["--loss-function=hinge"], "--loss-function: expected one of mse, bce, wbce"),
        (["--loss-weights=1"], "--loss-weights: expected two numbers"),
        (["--loss-threshold=0.5"], "--loss-threshold: expected a finite number of at least 0 and below 0.5"),
        (["--mini-batch-size=0"], "--mini-batch-size"),
        (["--mini-batch-size=9"], "--data-size=8 does not fill a batch of --mini-batch-size=9"),
        (["--nepochs=0"], "--nepochs: expected an integer from 1"),
        (["--print-freq=0"], "--print-freq: expected an integer from 1"),
        (["--mode=fast"], "--mode: expected one of eager, lazy, compile"),
        (["--data_type=fp16"], "--data_type: expected one of fp32, bf16"),
        (["--device=tpu"], "--device: expected one of auto, cpu, hpu, cuda"),
        (["--mode=cpu", "--device=hpu"], "--mode=cpu contradicts --device=hpu"),
        (["--numpy-rand-seed=-1"], "--numpy-rand-seed: expected an integer from 0 to 4294967295"),
        (["--rand-data-min=2"], "--rand-data-min=2 is above --rand-data-max=1"),
        (["--lerning-rate=1"], "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (["--print-tim"], "unknown flag --print-tim; did you mean --print-time?"),
        (["17"], "unexpected argument '17'"),
        (["--print-time=maybe"], "--print-time: expected true or false, got 'maybe'"),
        (["--load-model=/nowhere/m.pt"], "--load-model: there is no file '/nowhere/m.pt'"),
        (["--data-generation=dataset", "--raw-data-file=/nowhere"], "--raw-data-file: there is no file '/nowhere'"),
        (["--resume"], "--resume needs --load-model or --save-model"),
        (["--save-every=5"], "--save-every needs --save-model"),
        (["--save-model=m.pt", "--inference-only"], "--save-model keeps what was trained"),
        (["--mlperf-grad-accum-iter=0"], "--mlperf-grad-accum-iter: expected an integer from 1"),
        (["--lr-num-decay-steps=-1"], "--lr-num-decay-steps: expected an integer from 0"),
        (["--optimizer=adagrad", "--optimizer-eps=0"], "--optimizer-eps=0 divides by zero"),
        (["--optimizer-eps=-1e-8"], "--optimizer-eps: expected"),
        (["--data-generation=dataset"], "--data-generation=dataset needs --raw-data-file or --processed-data-file"),
    ],
)
def test_bad_input_is_refused_by_name(argv, message):
    with pytest.raises(UsageError) as refusal:
        parse(*argv)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("argument", ["--quantize-mlp-with-bit=8", "--quantize-emb-with-bit=8"])
def test_a_flag_that_is_not_available_yet_says_so_instead_of_being_ignored(argument):
    with pytest.raises(UsageError, match=f"{argument.split('=')[0]} is not available yet"):
        parse(argument)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--no-habana"], "device", "cpu"),
        (["--use-gpu"], "device", "cuda"),
        (["--run-lazy-mode"], "mode", "lazy"),
        (["--hmp"], "data_type", "bf16"),
        (["--mode", "custom"], "mode", "eager"),
        (["--mode", "cpu"], "device", "cpu"),
        (["-b", "8"], "mini_batch_size", 8),
        (["-d", "bf16"], "data_type", "bf16"),
        (["-w", "1"], "world_size", 1),
        (["--mini_batch_size=4"], "mini_batch_size", 4),
        (["--round-targets"], "round_targets", True),
        (["--round-targets=False"], "round_targets", False),
        (["--round-targets", "true"], "round_targets", True),
        (["--loss-weights=1e-5-2"], "loss_weights", (1e-5, 2.0)),
        (["--learning-rate", "1e-05"], "learning_rate", 1e-5),
    ],
)
def test_old_names_and_spellings(argv, field, value):
    assert getattr(parse(*argv), field) == value


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "arch_embedding_size": st.lists(st.integers(1, 2**31 - 1), min_size=1).map(tuple),
            "learning_rate": st.floats(0, 1e300),
            "loss_weights": st.tuples(st.floats(0, 1e30), st.floats(0, 1e30)),
            "print_time": st.booleans(),
            "test_freq": st.integers(-1, 10**6) | st.floats(0, 1, exclude_min=True, exclude_max=True),
            # The argparse of Python 3.11 loses the value "--".
            "report": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter("--".__ne__),
            "optimizer": st.sampled_from(["sgd", "adagrad", "rwsadagrad"]),
        },
    )
)
def test_a_command_line_reads_back_as_it_was(given_options):
    assert OptionParser(prog="test").parse_given(to_argv(given_options)) == given_options


@pytest.fixture(params=[80, 120])
def help_lines(request, monkeypatch, capsys) -> list[str]:
    """What the trainer prints at --help on a terminal of that many columns."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    with pytest.raises(SystemExit):
        OptionParser(prog="dlrm_s_pytorch.py", description="Trains a model.").parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= request.param
    return lines


def flags_of(lines: list[str]) -> list[str]:
    """Flags that begin a help text, each with its name in full, such as `--mode`."""
    return [match[1] for line in lines if (match := re.match(r"  (?:-\w [A-Z]+, )?(--[\w-]+)(?: |$)", line))]


def test_help_names_every_flag_once(help_lines):
    found = flags_of(help_lines)
    assert len(found) == len(set(found))
    assert {flag(field.name) for field in dataclasses.fields(Options)} <= set(found)


def test_help_opens_with_one_line_of_usage_and_the_common_flags(help_lines):
    assert help_lines[:5] == [
        "usage: python dlrm_s_pytorch.py [--flag=value ...]",
        "",
        "Trains a model.",
        "",
        "the few flags that most runs need:",
    ]
    assert flags_of(help_lines[: help_lines.index("examples:")]) == [
        "--device", "--mode", "--data_type", "--world_size", "--num-batches", "--mini-batch-size", "--learning-rate",
        "--optimizer", "--print-time", "--save-model", "--load-model",
    ]  # fmt: skip


def test_help_ends_with_the_flags_of_old_command_lines(help_lines):
    last = help_lines[help_lines.index("accepted for old command lines:") :]
    assert {"--hmp-verbose", "--local_rank", "--no-habana", "--hmp"} < set(flags_of(last))
    assert not any(line.endswith(":") for line in last[1:])


def test_examples_in_help_can_be_run(help_lines):
    examples = [shlex.split(line) for line in help_lines if line.startswith("  python dlrm_s_pytorch.py ")]
    assert len(examples) == 3
    for _, _, *flags in examples:
        parse(*flags)


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"raw_data_file": "x"}, ["--raw-data-file has no effect without --data-generation=dataset."]),
        ({"loss_weights": (1.0, 2.0)}, ["--loss-weights has no effect without --loss-function=wbce."]),
        ({"loss_weights": (1.0, 2.0), "loss_function": "wbce"}, []),
        ({"rand_data_alpha": 1.2}, ["--rand-data-alpha has no effect without --rand-data-dist=zipf."]),
        (
            {"mlperf_bin_shuffle": True, "qr_init": "even"},
            [
                "--mlperf-bin-shuffle has no effect without --data-generation=dataset.",
                "--qr-init has no effect without --qr-flag.",
            ],
        ),
        ({"mini_batch_size": 4, "optimizer": "adagrad"}, []),
    ],
)
def test_flags_that_have_no_effect_are_named(given, lines):
    assert flags_without_effect(Options(**given), given) == lines


def test_every_flag_that_needs_another_one_exists():
    names = {field.name for field in dataclasses.fields(Options)}
    for (needed, _), dependent in NEEDED_VALUES.items():
        assert {needed, *dependent} <= names
