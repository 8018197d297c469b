"""What every test may use."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# Every run tries the same few examples. P2PKV_TEST_EXAMPLES=10000 looks for new ones instead. Either way a failure prints the
# line that reproduces it.
settings.register_profile("default", derandomize=True, max_examples=50, deadline=None, print_blob=True)
if "P2PKV_TEST_EXAMPLES" in os.environ:
    examples = int(os.environ["P2PKV_TEST_EXAMPLES"])
    settings.register_profile("long", max_examples=examples, deadline=None, print_blob=True)
    settings.load_profile("long")
else:
    settings.load_profile("default")


collect_ignore = [] if find_spec("vllm") else ["vllm"]
"""`./dev test --vllm` runs those, in an environment of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/live/test_hostile_frames.py may be told."""
    parser.addoption("--hostile-frames", type=int, default=300, help="hostile frames to send to each door")
    parser.addoption("--hostile-seed", default="1", help="other hostile frames")


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """An empty 0700 directory, removed afterwards; its path is short, as a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="p2pkv-") as directory:
        yield Path(directory)
