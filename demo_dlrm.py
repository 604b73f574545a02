"""Launch the trainer: a file of `hb_configs/` and flags become its command line and its environment.

    python demo_dlrm.py --config=quickstart
    python demo_dlrm.py --config=single_node_dlrm_lazy_medium_bf16 --num-batches=20
    python demo_dlrm.py --list-configs
    python demo_dlrm.py --config=quickstart --dry-run
    python demo_dlrm.py --config=quickstart --world_size=4
    python demo_dlrm.py --config=quickstart --world_size=8 --launcher=mpirun --hosts=host1,host2
    python demo_dlrm.py --self-test

Which value counts, weakest first: the trainer's default, the file, the command line. In the environment: the file,
the caller. The trainer takes this process's place, so its exit status, Ctrl-C and signals need no help from here; with
several ranks, torchrun runs in this process, or mpirun below it (`dlrm/distributed/launch.py`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dlrm.distributed.launch import MASTER_PORT, LaunchJob, check_job, commands, launch, shell_command, threads_for_each
from dlrm.distributed.placement import check_sharding
from dlrm.errors import UsageError
from dlrm.options import OptionParser, Options, gaudi_environment, integer, one_of, to_argv

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "hb_configs"
TRAINER = [str(ROOT / "dlrm_s_pytorch.py")]
SELF_TEST = ["-m", "dlrm.self_test"]


class Config(NamedTuple):
    """What a configuration file sets."""

    given: dict[str, Any]  # {field of Options: value}
    environment: dict[str, str]


def find_config(name: str) -> Path:
    """The file that `--config` means: a path, or the name of a file in hb_configs/ without its ending."""
    for path in (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / name):
        if path.is_file():
            return path
    nearest = difflib.get_close_matches(name, [path.stem for path in CONFIGS.glob("*.yaml")], n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --list-configs shows what there is"
    raise UsageError(f"--config: there is no file and no configuration {name!r}{hint}")


def read_config(path: Path) -> Config:
    """UsageError names the file and the key that is wrong."""
    sections = mapping(load_yaml(path), str(path))
    for key in sections:
        if key not in ("model", "env_variables", "parameters"):
            raise UsageError(f"{path}: unknown key {key!r}; expected model, env_variables and parameters")
    if sections.get("model") != "dlrm":
        raise UsageError(f"{path}: model must be dlrm, not {sections.get('model')!r}")
    environment = mapping(sections.get("env_variables", {}), f"{path}: env_variables")
    for name, value in environment.items():
        if not name or "=" in name or not isinstance(value, str):
            raise UsageError(f"{path}: env_variables: {name}: expected a name and a text, got {value!r}")
    parameters = mapping(sections.get("parameters", {}), f"{path}: parameters")
    parser, given = OptionParser(add_help=False), {}  # the trainer's: what is the launcher's has no place in a file
    for argument in to_arguments(parameters, path):
        try:
            given |= parser.parse_given([argument])
        except UsageError as error:
            raise UsageError(f"{path}: parameters: {error}") from None
    return Config(given, environment)


def load_yaml(path: Path) -> Any:
    """Every scalar as the text it is, for a flag to read: YAML itself would take 1e-5 for a word and 1024-10-10 for a
    date."""
    try:
        return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # builds texts, lists and mappings, nothing else
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UsageError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where}: expected lines of the form key: value")
    return value


def to_arguments(parameters: dict[str, Any], path: Path) -> list[str]:
    """`{learning-rate: "1e-5", store_true: [print-time]}` -> `["--learning-rate=1e-5", "--print-time"]`."""
    parameters = dict(parameters)
    switches = parameters.pop("store_true", None) or []
    if not isinstance(switches, list) or not all(isinstance(switch, str) for switch in switches):
        raise UsageError(f"{path}: parameters: store_true: expected a list of flags")
    for key, value in parameters.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}: parameters: {key}: expected one value, got {value!r}")
    return [*(f"--{key}={value}" for key, value in parameters.items()), *(f"--{switch}" for switch in switches)]


def list_configs() -> str:
    """Name and first comment line of each configuration."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    return "\n".join(f"{path.stem:{width}}  {path.read_text().splitlines()[0].lstrip('# ')}" for path in paths)


def make_parser() -> OptionParser:
    parser = OptionParser(
        prog="demo_dlrm.py", description=__doc__.splitlines()[0], epilog="All other flags are the trainer's."
    )
    launcher = parser.add_argument_group("launcher")
    launcher.add_argument("--config", "--hb_config", "--hb-config", metavar="NAME|PATH", help="a file of hb_configs/")
    launcher.add_argument("--list-configs", action="store_true", help="print what --config can name")
    launcher.add_argument("--dry-run", action="store_true", help="print the command, ready to paste; run nothing")
    launcher.add_argument("--self-test", action="store_true", help="check installation, device and kernels")
    ranks = parser.add_argument_group("launcher of several ranks, --world_size of them")
    ranks.add_argument("--launcher", type=one_of("torchrun", "mpirun"), help="torchrun or mpirun [torchrun]")
    ranks.add_argument("--hosts", type=host_names, help="where ranks run, equally many on each; under torchrun, the "
                       "first one is where they meet [this host]")  # fmt: skip
    ranks.add_argument("--node-rank", type=integer(0), help="torchrun: which of the hosts this one is, from 0; without "
                       "it, what to run on each is printed")  # fmt: skip
    ranks.add_argument("--master-addr", help="address of the first host for the others [its name]")
    ranks.add_argument("--master-port", type=integer(1, 65535), help=f"torchrun, with --hosts: a port that is free on "
                       f"the first one [{MASTER_PORT}]")  # fmt: skip
    return parser


def host_names(text: str) -> tuple[str, ...]:
    """`"host1,host2"` -> `("host1", "host2")`."""
    return tuple(one_host(name) for name in text.split(","))


def one_host(name: str) -> str:
    if not name or name.startswith("-") or any(character.isspace() for character in name):
        raise argparse.ArgumentTypeError(f"expected names joined by commas such as host1,host2, got {name!r}")
    return name


def take_job(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the flags of `LaunchJob` out of those given."""
    return {name: given.pop(name) for name in LaunchJob._fields if name in given}


def run(argv: Sequence[str]) -> int:
    """Replaces this process by the trainer, or runs a job of several ranks, unless there is nothing to run."""
    parser = make_parser()
    given = parser.parse_given(argv)
    launcher_flags = ("config", "list_configs", "dry_run", "self_test")
    config_name, wants_list, dry_run, self_test = (given.pop(name, None) for name in launcher_flags)
    if wants_list:
        print(list_configs())
        return 0
    job_flags = take_job(given)
    config = read_config(find_config(config_name)) if config_name else Config({}, {})
    given = config.given | given
    options = Options(**given)  # wrong flags end here, before torch takes its seconds to come in
    environment = {name: value for name, value in config.environment.items() if name not in os.environ}
    environment |= gaudi_environment(options)
    if self_test:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [*(SELF_TEST if self_test else TRAINER), *to_argv(given)]
    job = LaunchJob(options.world_size, timeout=options.dist_timeout, **job_flags)
    if job_flags and job.size == 1:
        raise UsageError(f"--{next(iter(job_flags)).replace('_', '-')} needs --world_size of 2 or more")
    if job.size > 1 and not (options.print_plan or self_test):
        check_job(job, job_flags)
        check_sharding(options, job.size)
        environment |= threads_for_each(job.ranks_per_host)
        if dry_run:
            print("\n".join(shell_command(command, environment) for command in commands(job, program, environment)))
            return 0
        return launch(job, program, environment)
    command = [sys.executable, *program]
    if dry_run:
        print(shell_command(command, environment))
        return 0
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | environment)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0 for a list or a dry run, 2 for flags or a file that can't work; else the trainer's exit status."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"demo_dlrm.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
