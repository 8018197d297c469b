"""What README and docs/ say is true: commands and options exist, Python runs, yaml is accepted, links lead somewhere.

A ```python block whose first line is `# run` is run; any other is only compiled.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from p2pkv.config import NodeConfig

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]
FENCED = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\((?!\w+:)(?P<target>[^)#\s]+)")
OURS = re.compile(r"\$ (?:\w+=\S* +)*(?P<program>p2pkv|\./dev)(?P<arguments>$| .*)")
OPTION = re.compile(r"--[a-z][a-z-]+")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One of our commands after a `$ ` in a ```console block, without variables before it and pipes after it."""

    block: Block
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join((self.program, *self.arguments))}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in FENCED.finditer(text):
            body = "\n".join(line.removeprefix(found["indent"]) for line in found["text"].splitlines())
            yield Block(page, text.count("\n", 0, found.start()) + 1, found["language"], body)


def commands() -> Iterator[Command]:
    for block in blocks():
        if block.language != "console":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if found := OURS.match(line):
                words = shlex.split(re.split(r" [|&>]", found["arguments"])[0], comments=True)
                yield Command(block, found["program"], tuple(words))


def commands_of(program: str) -> list[Command]:
    return [command for command in commands() if command.program == program]


def blocks_in(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


@cache
def output_of(*command: str) -> str:
    """What a command says, wide enough that nothing is cut off."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, f"{shlex.join(command)} exited with {ended.returncode}:\n{ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.mark.parametrize("command", commands_of("p2pkv"), ids=str)
def test_a_p2pkv_command_exists_with_its_options(command: Command) -> None:
    subcommand = [word for word in command.arguments[:1] if not word.startswith("-")]
    usage = output_of(sys.executable, "-c", "from p2pkv.cli import main; main()", *subcommand, "--help")
    options = {word.split("=")[0] for word in command.arguments if word.startswith("--")}
    assert options <= set(OPTION.findall(usage))


@pytest.mark.parametrize("command", commands_of("./dev"), ids=str)
def test_a_dev_command_exists(command: Command) -> None:
    listed = re.findall(r"^  ([a-z-]+) ", output_of(str(ROOT / "dev"), "--help"), re.MULTILINE)
    assert set(command.arguments[:1]) <= set(listed)


@pytest.mark.parametrize("block", blocks_in("python"), ids=str)
def test_python_compiles_and_runs_where_it_says_so(block: Block, tmp_path: Path) -> None:
    compile(block.text, str(block), "exec")
    if block.text.startswith("# run\n"):
        subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, timeout=60, check=True)


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=str)
def test_yaml_is_what_a_node_accepts(block: Block, tmp_path: Path) -> None:
    if "lmcache_instance_id" in yaml.safe_load(block.text):
        path = tmp_path / "instance.yaml"
        path.write_text(block.text)
        NodeConfig.from_yaml(path, environ={})


def test_the_tests_that_are_named_exist() -> None:
    existing = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 10
    assert named <= existing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    prose = FENCED.sub("", page.read_text())
    missing = [link["target"] for link in LINK.finditer(prose) if not (page.parent / link["target"]).exists()]
    assert not missing
