"""README.md and docs/: links lead somewhere, and the programs accept the commands and know the flags."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import demo_dlrm
from dlrm.options import OptionParser, Options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/hpu_emulator/README.md"]
COMMAND = re.compile(r"^    (?:\w+=\S+ )*((?:python3?|pip|pytest) .*)$", re.MULTILINE)
# Flags in running text that belong to other programs than the trainer and its launcher.
FLAGS_OF_OTHERS = {"--plot", "--ruleset", "--trace-file-binary-type"}


def commands() -> list[str]:
    """Returns the commands in all pages, those joined by && one by one."""
    lines = [line for page in PAGES for line in COMMAND.findall(page.read_text())]
    return sorted({command for line in lines for command in line.split(" && ")})


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for page in PAGES[1:-1]:
        assert f"](docs/{page.name})" in text


@pytest.fixture
def data_files(tmp_path, monkeypatch):
    """Makes a folder with empty files under the names that the pages use, and enters it."""
    for name in ("input/train.txt", "input/day_0"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python demo_dlrm.py")])
def test_the_launcher_accepts_the_command(command, data_files, capsys):
    if "mpirun" in command:
        pytest.importorskip("mpi4py")
    if not command.endswith("--help"):
        assert demo_dlrm.main([*shlex.split(command)[2:], "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python dlrm_s_pytorch.py")])
def test_the_trainer_accepts_the_command(command, data_files):
    Options(**OptionParser(prog="trainer").parse_given(shlex.split(command.removesuffix("..."))[2:]))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m ")])
def test_a_module_knows_the_flags_of_its_command(command):
    _, _, module, *arguments = shlex.split(command)
    origin = Path(importlib.util.find_spec(module).origin)
    # The tools of tests/stress have the flags of their common function.
    sources = [origin, origin.with_name("forked.py")] if module.startswith("tests.stress.") else [origin]
    source = "".join(path.read_text() for path in sources)
    known = OptionParser(prog="trainer")._option_string_actions
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.split("=")[0]
            assert name in known or f'"{name}"' in source, name


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("pip ", "pytest "))])
def test_files_in_the_command_exist(command):
    for word in shlex.split(command):
        assert not word.endswith((".txt", ".py")) or (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_in_the_text_are_known(page):
    text = COMMAND.sub("", page.read_text())
    parser = demo_dlrm.make_parser()
    known = parser._option_string_actions.keys() | FLAGS_OF_OTHERS
    for name in re.findall(r"`(--[a-z][\w-]*)", text):
        assert {name, parser._respelled(name)} & known, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_in_the_text_exist(page):
    for name in re.findall(r"`((?:dlrm|tests|benchmarks|hb_configs)/[\w./]*)`", page.read_text()):
        assert (ROOT / name).exists(), name
