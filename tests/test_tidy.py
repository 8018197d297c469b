"""Style as unit tests: the tree keeps the rules of tidy.py, and each rule, ruff's too, catches what it is there for."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests import tidy

ROOT = Path(__file__).parent.parent
PATHS = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\0")[:-1]
SOURCES = [
    tidy.Source(path, (ROOT / path).read_text())
    for path in PATHS
    if (path.endswith(".py") or path == "dev") and (ROOT / path).exists()
]
RULES = (tidy.import_wall, tidy.confinement, tidy.core_purity, tidy.core_order, tidy.sizes)


def report(problems: Iterable[tidy.Problem]) -> str:
    return "\n".join(dict.fromkeys(map(str, problems)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: tidy.Rule) -> None:
    found = report(problem for source in SOURCES for problem in rule(source))
    assert not found, f"{rule.__doc__}\n{found}"


def test_a_node_starts_without_the_libraries_of_engines() -> None:
    found = report(tidy.heavy_imports(SOURCES, ["p2pkv.cli", "p2pkv.commands.node", "p2pkv.node"]))
    assert not found, f"\n{found}"


def test_nothing_else_stands_at_top_level() -> None:
    found = report(tidy.top_level(PATHS))
    assert not found, f"\n{found}"


def test_every_exception_from_the_sizes_names_something_that_exists() -> None:
    known = {source.path for source in SOURCES} | {
        f"{source.path}::{node.name}"
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(tidy.SIZE_EXCEPTIONS) <= known


# --- each rule bites ------------------------------------------------------------------------------------------------------

LONG_FUNCTION = "def f():\n" + "    a = 1\n" * tidy.FUNCTION_LINES
LONG_DOCSTRING = 'def f():\n    """One.\n' + "\n    More.\n" * tidy.FUNCTION_LINES + '    """\n'


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (tidy.import_wall, "p2pkv/store/cpu.py", "from p2pkv.net.driver import Driver"),
        (tidy.import_wall, "p2pkv/net/driver.py", "import p2pkv.store.cpu"),
        (tidy.import_wall, "p2pkv/net/driver.py", "from p2pkv import store"),
        (tidy.import_wall, "p2pkv/wire/codec.py", "def f():\n    import p2pkv.net.driver"),
        (tidy.import_wall, "p2pkv/engines/cache.py", "from p2pkv.node import open_node"),
        (tidy.import_wall, "p2pkv/node.py", "from p2pkv.cli import main"),
        (tidy.import_wall, "p2pkv/net/driver.py", "from p2pkv import open_node"),
        (tidy.import_wall, "p2pkv/core/ids.py", "from p2pkv.config import NodeConfig"),
        (tidy.import_wall, "p2pkv/attic/old.py", ""),
        (tidy.confinement, "p2pkv/net/driver.py", "import msgpack"),
        (tidy.confinement, "p2pkv/engines/cache.py", "from vllm.config import VllmConfig"),
        (tidy.confinement, "p2pkv/net/driver.py", "from msgpack import packb"),
        (tidy.confinement, "p2pkv/node.py", "import trio\ntrio.run(main)"),
        (tidy.confinement, "p2pkv/node.py", "from trio import run"),
        (tidy.core_purity, "p2pkv/core/probe.py", "import time"),
        (tidy.core_purity, "p2pkv/core/probe.py", "from os import path"),
        (tidy.core_purity, "p2pkv/core/probe.py", "import random"),
        (tidy.core_purity, "p2pkv/core/probe.py", "from random import choice"),
        (tidy.core_purity, "p2pkv/core/probe.py", "from random import Random\nrng = Random()"),
        (tidy.core_purity, "p2pkv/core/probe.py", "def f():\n    import trio"),
        (tidy.core_purity, "p2pkv/core/probe.py", "bucket = hash('a') % 8"),
        (tidy.core_order, "p2pkv/core/probe.py", "for a in {1, 2}:\n    f(a)"),
        (tidy.core_order, "p2pkv/core/probe.py", "a = [f(b) for b in set(c)]"),
        (tidy.core_order, "p2pkv/core/probe.py", "def f(a: frozenset[str]):\n    return tuple(a)"),
        (tidy.core_order, "p2pkv/core/probe.py", "def f(a):\n    b = set(a)\n    return list(x for x in b)"),
        (
            tidy.core_order,
            "p2pkv/core/probe.py",
            "def f(a: dict[str, str], b: dict[str, str]):\n    return [*(a.keys() & b.keys())]",
        ),
        (
            tidy.core_order,
            "p2pkv/core/probe.py",
            "class A:\n    keys: set[str]\n    def f(self):\n        return self.keys.pop()",
        ),
        (
            tidy.core_order,
            "p2pkv/core/probe.py",
            "def f(self):\n    self.a = set[str]()\n    return next(iter(self.a | self.b))",
        ),
        (tidy.sizes, "p2pkv/node.py", LONG_FUNCTION),
        (tidy.sizes, "p2pkv/node.py", "a = 1\n" * (tidy.FILE_LINES + 1)),
        (tidy.sizes, "tests/test_node.py", "a = 1\n" * (tidy.TEST_FILE_LINES + 1)),
    ],
)
def test_a_rule_finds(rule: tidy.Rule, path: str, text: str) -> None:
    assert report(rule(tidy.Source(path, text))).startswith(f"{path}:")


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (tidy.import_wall, "p2pkv/net/driver.py", "from p2pkv.core.ids import Address\nfrom p2pkv.net import links"),
        (tidy.import_wall, "tests/test_node.py", "from p2pkv.cli import main"),
        (tidy.confinement, "p2pkv/wire/codec.py", "import msgpack"),
        (tidy.confinement, "p2pkv/cli.py", "import trio\ntrio.run(main)"),
        (tidy.confinement, "p2pkv/node.py", "import trio\nfrom trio import run_process"),
        (tidy.core_purity, "p2pkv/core/probe.py", "from random import Random\ndef f(rng: Random):\n    return rng.random()"),
        (
            tidy.core_order,
            "p2pkv/core/probe.py",
            "def f(a: set[str]):\n    return sorted(x for x in a), len(a), {*()}, 'b' in a",
        ),
        (tidy.core_order, "p2pkv/core/probe.py", "def f(a: dict[str, str]):\n    return [x for x in a.keys()]"),
        (tidy.core_order, "p2pkv/core/probe.py", "def f(a: set[str]): ...\ndef g(a: list[str]):\n    return list(a)"),
        (tidy.sizes, "p2pkv/node.py", LONG_DOCSTRING),
    ],
)
def test_a_rule_leaves_alone(rule: tidy.Rule, path: str, text: str) -> None:
    assert not report(rule(tidy.Source(path, text)))


def test_a_heavy_import_is_found_through_other_modules() -> None:
    sources = [
        tidy.Source("p2pkv/node.py", "from p2pkv.net import driver"),
        tidy.Source("p2pkv/net/__init__.py", "if True:\n    import transformers"),
        tidy.Source("p2pkv/net/driver.py", "from p2pkv.wire.codec import encode"),
        tidy.Source("p2pkv/wire/codec.py", "import torch.nn"),
    ]
    found = [(problem.path, problem.line) for problem in tidy.heavy_imports(sources, ["p2pkv.node"])]
    assert sorted(found) == [("p2pkv/net/__init__.py", 2), ("p2pkv/wire/codec.py", 1)]


def test_a_heavy_import_that_a_node_never_runs_is_left_alone() -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import transformers"
    sources = [tidy.Source("p2pkv/node.py", lazy), tidy.Source("p2pkv/engines/layout.py", "import torch")]
    assert not report(tidy.heavy_imports(sources, ["p2pkv.node"]))


def test_a_stray_file_at_top_level_is_found() -> None:
    found = [problem.path for problem in tidy.top_level(["p2pkv/node.py", ".ci/run", "scratch.py", "utils/a.py"])]
    assert found == ["scratch.py", "utils"]


@pytest.mark.parametrize(
    ("code", "path", "text"),
    [
        ("BLE001", "p2pkv/net/driver.py", "try:\n    f()\nexcept Exception:\n    g()\n"),
        ("E722", "p2pkv/net/driver.py", "try:\n    f()\nexcept:\n    g()\n"),
        ("T201", "p2pkv/net/driver.py", "print(1)\n"),
        ("FIX002", "p2pkv/net/driver.py", "# TODO: later\n"),
        ("ERA001", "p2pkv/net/driver.py", "# value = f(1)\n"),
        ("S301", "p2pkv/wire/codec.py", "import pickle\npickle.loads(data)\n"),
        ("D100", "p2pkv/net/driver.py", "a = 1\n"),
        ("D101", "p2pkv/net/driver.py", "class A:\n    a = 1\n"),
        ("D102", "p2pkv/net/driver.py", 'class A:\n    """A."""\n\n    def f(self) -> None:\n        return\n'),
        ("D103", "p2pkv/net/driver.py", "def f() -> None:\n    return\n"),
        ("TID252", "p2pkv/net/driver.py", "from .links import Link\n"),
    ],
)
def test_ruff_finds(code: str, path: str, text: str) -> None:
    assert code in ruff(path, text)


@pytest.mark.parametrize(
    ("code", "path", "text"),
    [
        ("BLE001", "p2pkv/net/driver.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise\n"),
        ("T201", "sims/report.py", "print(1)\n"),
        ("D100", "tests/test_node.py", "a = 1\n"),
    ],
)
def test_ruff_leaves_alone(code: str, path: str, text: str) -> None:
    assert code not in ruff(path, text)


def ruff(path: str, text: str) -> str:
    """What ruff says about `text` as the file `path`."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", f"--stdin-filename={path}", "-"]
    return subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False).stdout
