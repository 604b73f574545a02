"""Launch the trainer: a file of `hb_configs/` and flags become its command line and its environment.

    python demo_dlrm.py --config=quickstart
    python demo_dlrm.py --config=single_node_dlrm_lazy_medium_bf16 --num-batches=20
    python demo_dlrm.py --list-configs
    python demo_dlrm.py --config=quickstart --dry-run
    python demo_dlrm.py --self-test

Which value counts, weakest first: the trainer's default, the file, the command line. In the environment: the file,
the caller. The trainer takes this process's place, so its exit status, Ctrl-C and signals need no help from here.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dlrm_options import OptionParser, Options, UsageError, gaudi_environment, to_argv

CONFIGS = Path(__file__).resolve().parent / "hb_configs"
TRAINER = Path(__file__).resolve().with_name("dlrm_s_pytorch.py")
SELF_TEST = Path(__file__).resolve().with_name("dlrm_self_test.py")


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


def read_config(path: Path, parser: OptionParser) -> Config:
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
    given = {}
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
    return parser


def run(argv: Sequence[str]) -> None:
    """Replaces this process by the trainer, unless there is nothing to run."""
    parser = make_parser()
    given = parser.parse_given(argv)
    launcher_flags = ("config", "list_configs", "dry_run", "self_test")
    config_name, wants_list, dry_run, self_test = (given.pop(name, None) for name in launcher_flags)
    if wants_list:
        print(list_configs())
        return
    config = read_config(find_config(config_name), parser) if config_name else Config({}, {})
    given = config.given | given
    options = Options(**given)  # wrong flags end here, before torch takes its seconds to come in
    environment = {name: value for name, value in config.environment.items() if name not in os.environ}
    environment |= gaudi_environment(options)
    command = [sys.executable, str(SELF_TEST if self_test else TRAINER), *to_argv(given)]
    if dry_run:
        settings = [f"{name}={value}" for name, value in environment.items()]
        print(shlex.join(["env", *settings, *command]))
        return
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | environment)


def main(argv: Sequence[str] | None = None) -> int:
    """0 for a list or a dry run, 2 for flags or a file that can't work; else the trainer's exit status."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except UsageError as error:
        print(f"demo_dlrm.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
