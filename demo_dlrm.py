"""Launches the trainer with the settings of a configuration file and of flags.

    python demo_dlrm.py --config=quickstart
    python demo_dlrm.py --config=single_node_dlrm_compile_medium_bf16 --num-batches=20
    python demo_dlrm.py --list-configs
    python demo_dlrm.py --config=quickstart --dry-run
    python demo_dlrm.py --config=quickstart --world_size=4
    python demo_dlrm.py --config=quickstart --world_size=8 --launcher=mpirun --hosts=host1,host2
    python demo_dlrm.py --self-test

A flag wins over the file, and the file over the trainer's default. A variable of the caller's environment wins over the
file's `env_variables`. The trainer replaces this process, so its exit status, Ctrl-C and signals need no care here.
With several ranks, torchrun runs in this process, or mpirun as its child (`dlrm/distributed/launch.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dlrm.distributed.launch import LaunchJob, check_job, commands, launch, shell_command, threads_for_each
from dlrm.distributed.placement import check_sharding
from dlrm.errors import UsageError
from dlrm.options import OptionParser, Options, flag, gaudi_environment, integer, one_of, option, to_argv
from dlrm.system.endings import end_by, mend_streams

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "hb_configs"
TRAINER = [str(ROOT / "dlrm_s_pytorch.py")]
SELF_TEST = ["-m", "dlrm.self_test"]

# ---------------------------------------------------------------------------------------------------------------------
# Configuration files
# ---------------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The settings of a configuration file."""

    given: dict[str, Any]  # {field of Options: value}
    environment: dict[str, str]


def find_config(name: str) -> Path:
    """Returns the file that `--config=NAME` means: a path, or a file of hb_configs/ with or without its ending."""
    for path in (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / name):
        if path.is_file():
            return path
    nearest = difflib.get_close_matches(name, [path.stem for path in CONFIGS.glob("*.yaml")], n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --list-configs shows what there is"
    raise UsageError(f"--config: there is no file and no configuration {name!r}{hint}")


def read_config(path: Path) -> Config:
    """Reads a configuration file. Raises a UsageError that names the file and the key if something in it is wrong."""
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
    parser, given = OptionParser(add_help=False), {}  # of the trainer: flags of the launcher have no place in a file
    for argument in to_arguments(parameters, path):
        try:
            read = parser.parse_given([argument])
        except UsageError as error:
            raise UsageError(f"{path}: parameters: {error}") from None
        if twice := given.keys() & read.keys():
            raise UsageError(f"{path}: parameters: {flag(twice.pop())} is given twice")
        given |= read
    return Config(given, environment)


class ConfigLoader(yaml.BaseLoader):
    """Builds strings, lists and mappings only, and refuses what would be lost or could not be a flag's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value!r} is no text", node.start_mark)
        return super().construct_scalar(node)


def load_yaml(path: Path) -> Any:
    """Reads a YAML file, in which every scalar stays a string.

    Flags turn strings into values. YAML itself would take 1e-5 for a word and 1024-10-10 for a date.
    """
    try:
        return yaml.load(path.read_text(), Loader=ConfigLoader)
    except RecursionError:
        raise UsageError(f"{path}: lists or mappings are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UsageError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Returns `value` if it is a mapping whose keys are strings; else raises a UsageError that begins with `where`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where}: expected lines of the form key: value")
    return value


def to_arguments(parameters: dict[str, Any], path: Path) -> list[str]:
    """Returns `["--learning-rate=1e-5", "--print-time"]` for `{learning-rate: "1e-5", store_true: [print-time]}`."""
    parameters = dict(parameters)
    switches = parameters.pop("store_true", None) or []
    if not isinstance(switches, list) or not all(isinstance(switch, str) for switch in switches):
        raise UsageError(f"{path}: parameters: store_true: expected a list of flags")
    for key, value in parameters.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}: parameters: {key}: expected one value, got {value!r}")
    return [*(f"--{key}={value}" for key, value in parameters.items()), *(f"--{switch}" for switch in switches)]


def list_configs() -> str:
    """Returns a line per configuration: its name, and the comment in the first line of its file."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    return "\n".join(f"{path.stem:{width}}  {path.read_text().splitlines()[0].lstrip('# ')}" for path in paths)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = (
    "python %(prog)s --config=quickstart",
    "python %(prog)s --config=quickstart --world_size=2 --num-batches=20",
    "python %(prog)s --config=single_node_dlrm_compile_medium_bf16 --dry-run",
)
JOB_DEFAULTS = LaunchJob._field_defaults


def host_names(text: str) -> tuple[str, ...]:
    """Reads names joined by commas: `"host1,host2"` is `("host1", "host2")`."""
    return tuple(host_name(name) for name in text.split(","))


def host_name(name: str) -> str:
    if not name or name.startswith("-") or any(character.isspace() for character in name):
        raise argparse.ArgumentTypeError(f"expected names joined by commas such as host1,host2, got {name!r}")
    return name


@dataclass(frozen=True)
class LauncherOptions:
    """The flags that say what the launcher does."""

    # fmt: off
    config: str = option("", "the configuration: a name that --list-configs prints, or the path of a YAML file",
                         group="launcher", placeholder="NAME|PATH", common=True)
    list_configs: bool = option(False, "print the names of all configurations with a line about each, and exit", None)
    dry_run: bool = option(False, "print the command that would run, ready to paste, and exit", None)
    self_test: bool = option(False, "check the installation, the device and the kernels instead of training", None)
    # fmt: on


@dataclass(frozen=True)
class RankOptions:
    """The flags that say how the ranks are started; each is the field of `LaunchJob` of the same name."""

    # fmt: off
    launcher: str = option(JOB_DEFAULTS["launcher"], "the program that starts the ranks: torchrun or mpirun",
                           one_of("torchrun", "mpirun"), group="launching several ranks")
    hosts: tuple[str, ...] = option(JOB_DEFAULTS["hosts"], "the hosts on which ranks run, equally many on each; under "
                                    "torchrun, ranks meet on the first", host_names, placeholder="HOST,HOST,...",
                                    shown_default="this host")
    node_rank: int = option(JOB_DEFAULTS["node_rank"], "torchrun: the number of this host among --hosts, from 0; "
                            "without it, the command to run on each host is printed", integer(0), shown_default="")
    master_addr: str = option(JOB_DEFAULTS["master_addr"], "the address at which the other hosts reach the first",
                              placeholder="HOST", shown_default="its name in --hosts")
    master_port: int = option(JOB_DEFAULTS["master_port"], "torchrun: a port that is free on the first of --hosts",
                              integer(1, 65535))
    # fmt: on


def make_parser() -> OptionParser:
    """Returns the parser of the launcher's flags and all flags of the trainer."""
    parser = OptionParser(
        declarations=(LauncherOptions, RankOptions, Options),
        prog="demo_dlrm.py",
        description=__doc__.splitlines()[0],
        examples=EXAMPLES,
    )
    parser.old_flags.add_argument("--hb-config", dest="config", metavar="NAME|PATH", help="the same as --config")
    return parser


def take_flags(given: dict[str, Any], declaration: type) -> dict[str, Any]:
    """Removes the flags of a dataclass from `given`, and returns them."""
    names = [field.name for field in dataclasses.fields(declaration)]
    return {name: given.pop(name) for name in names if name in given}


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """Does what the flags ask for, and returns the exit status. The trainer on one rank replaces this process."""
    given = make_parser().parse_given(argv)
    launcher = LauncherOptions(**take_flags(given, LauncherOptions))
    job_flags = take_flags(given, RankOptions)
    if launcher.list_configs:
        print(list_configs())
        return 0
    config = read_config(find_config(launcher.config)) if launcher.config else Config({}, {})
    given = config.given | given
    options = Options(**given)  # wrong flags end the run here, before torch takes seconds to be imported
    if job_flags and options.world_size == 1:
        raise UsageError(f"{flag(next(iter(job_flags)))} needs --world_size of 2 or more")
    environment = make_environment(options, config)
    if launcher.self_test:
        return run_alone([*SELF_TEST, *to_argv(given)], environment | self_test_environment(), launcher.dry_run)
    program = [*TRAINER, *to_argv(given)]
    if options.world_size == 1 or options.print_plan:
        return run_alone(program, environment, launcher.dry_run)
    return run_ranks(make_job(options, job_flags), program, environment, launcher.dry_run)


def make_environment(options: Options, config: Config) -> dict[str, str]:
    """Returns the variables to set: those of the configuration that the caller has not set, and the Gaudi plugin's."""
    unset = {name: value for name, value in config.environment.items() if name not in os.environ}
    return unset | gaudi_environment(options)


def self_test_environment() -> dict[str, str]:
    """Returns a PYTHONPATH with this folder in front, where `python -m dlrm.self_test` finds the package."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_alone(program: Sequence[str], environment: Mapping[str, str], dry_run: bool) -> int:
    """Replaces this process by Python with the arguments `program`. A dry run prints the command, and returns 0."""
    command = [sys.executable, *program]
    if not dry_run:
        sys.stdout.flush()
        os.execve(command[0], command, os.environ | environment)
    print(shell_command(command, environment))
    return 0


def make_job(options: Options, job_flags: Mapping[str, Any]) -> LaunchJob:
    """Returns the job that starts the ranks. Raises a UsageError if it cannot work."""
    job = LaunchJob(options.world_size, timeout=options.dist_timeout, **job_flags)
    check_job(job, job_flags)
    check_sharding(options, job.size)
    return job


def run_ranks(job: LaunchJob, program: Sequence[str], environment: Mapping[str, str], dry_run: bool) -> int:
    """Runs `program` on all ranks, and returns the exit status. A dry run prints the commands, and returns 0."""
    environment = {**environment, **threads_for_each(job.ranks_per_host)}
    if not dry_run:
        return launch(job, program, environment)
    print("\n".join(shell_command(command, environment) for command in commands(job, program, environment)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 for a list or a dry run, 2 for flags that cannot work, else the trainer's."""
    mend_streams()
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except Exception as error:
        return end_by("demo_dlrm.py", error)


if __name__ == "__main__":
    sys.exit(main())
