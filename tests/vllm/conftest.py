"""Fixtures of tests that run vLLM, in an environment of their own: `./dev test --vllm`."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from p2pkv.demo.vllm import ENVIRONMENT
from p2pkv.engines.reference.model import save_tiny_llama
from tests.live.command_line import free_port, write_config
from tests.vllm.engines import Server, end_nodes, in_process, served

os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")  # before vLLM is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What vLLM and its libraries warn of is theirs."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Llama with its tokenizer: 4 layers, 2 KV heads of 64, float32, 4,096 tokens."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def configure(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Writes an instance's file and makes it that of the engines started from then on; their nodes are ended afterwards."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", f"localhost:{free_port()}")

    def write(name: str, *lines: str) -> Path:
        path = write_config(tmp_path, name, *lines)
        monkeypatch.setenv("P2PKV_CONFIG_FILE", str(path))
        return path

    yield write
    end_nodes(runtime_dir)


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Callable[..., Any]]:
    """Starts vLLM in this process, as `in_process` does; a second call ends the first one's."""
    with ExitStack() as running:

        def start(**options: Any) -> Any:
            running.close()
            return running.enter_context(in_process(tiny_model, **options))

        yield start


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts `vllm serve`, as `served` does; all are ended afterwards."""
    with ExitStack() as running:
        logs = (tmp_path / f"vllm-{number}.log" for number in range(1, 100))

        def start(*arguments: str, **options: Any) -> Server:
            return running.enter_context(served(tiny_model, next(logs), *arguments, **options))

        yield start
