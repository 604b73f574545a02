"""The import rule: what a file may import follows from the folder it is in."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From left to right in the rule of `dlrm/__init__.py`: a file imports from its own level or from lower ones.
LEVELS = {
    "dlrm.errors": 0,
    "dlrm.system": 0,
    "dlrm.options": 1,
    "dlrm.batch": 1,
    "dlrm.kernels": 2,
    "dlrm.devices": 3,
    "dlrm.data": 4,
    "dlrm.pipeline": 5,
    "dlrm.distributed": 6,
    "dlrm.checkpoint": 7,
    "dlrm.output": 7,
    "dlrm.evaluation": 7,
    "dlrm_habana_kernels": 8,
    "dlrm_s_pytorch": 9,
    "demo_dlrm": 10,
    "dlrm.self_test": 10,
}
PROGRAMS = {"dlrm_s_pytorch", "demo_dlrm", "dlrm.self_test"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in [*ROOT.glob("*.py"), *(ROOT / "dlrm").rglob("*.py")]}


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            names |= submodules or {node.module}
    return names & SOURCES.keys()


def level(module: str) -> int:
    return LEVELS.get(module, LEVELS.get(".".join(module.split(".")[:2])))


MODULES = sorted(SOURCES.keys() - {"dlrm"})


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_from_its_own_folder_or_from_the_left(module):
    assert level(module) is not None, "it has no place in the rule"
    for imported in imported_modules(SOURCES[module]):
        assert imported not in PROGRAMS or module in PROGRAMS, f"{imported} is a program"
        assert level(imported) <= level(module), imported
        if level(imported) == level(module):
            assert imported.split(".")[:2] == module.split(".")[:2] or level(module) < 2, imported


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({module: imported_modules(SOURCES[module]) for module in MODULES}).prepare()


BEFORE_TORCH = ["dlrm", "dlrm.distributed", "dlrm.options", "dlrm.distributed.launch", "demo_dlrm"]


@pytest.mark.parametrize("package", BEFORE_TORCH)
def test_what_runs_before_the_environment_is_set_imports_no_torch(package):
    program = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_top_level_holds_the_programs_and_one_package():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    assert {name.split("/")[0] for name in tracked} == {
        ".ci", ".clang-format", ".gitignore", "LICENSE", "README.md", "benchmarks", "constraints.txt", "demo_dlrm.py",
        "dlrm", "dlrm_habana_kernels.py", "dlrm_s_pytorch.py", "docs", "hb_configs", "pyproject.toml",
        "requirements-data.txt", "requirements-dev.txt", "requirements-mpi.txt", "requirements.txt", "tests",
    }  # fmt: skip
