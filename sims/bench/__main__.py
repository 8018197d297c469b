"""`python -m sims.bench NAME ...`: run benchmarks and print what they measured."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from sims.bench.report import print_rows

BENCHES = {
    "agreement": "25 nodes with 10,000 chunks each: until all know what all hold; memory a node",
    "directory": "a view of 100 members with 10,000 chunks each: memory, prefix lookups, updates",
    "handoff": "32 chunks of 32 MiB between two instances of one host",
    "tcp": "the same over loopback TCP with checksums, beside a bare transfer",
    "lookup": "lookups of 512 and of 131,072 tokens, and how long they stall the node",
    "membership": "25 nodes, killed and stopped: until all know; serf beside them where it is installed",
    "node": "time until a node is ready, and its idle memory",
    "small": "moves of 12 tokens over HTTP and over the websocket",
    "together": "a hundred moves at once over loopback TCP, beside one move of the same bytes",
    "vllm": "real vLLM on the CPU, in .venv-vllm: overhead, time to first token after a move, a trace",
}


def main() -> None:
    """Run what the command line names."""
    listing = "\n".join(f"  {name:<12}{meaning}" for name, meaning in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="./dev bench", epilog=f"benchmarks:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object a benchmark")
    parser.add_argument("--only", choices=("overhead", "ttft", "replay"), help="of vllm: measure this and nothing else")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="of vllm: conversation_trace.jsonl; without it nothing is replayed"
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        options: dict[str, Any] = {"only": arguments.only, "trace": arguments.trace} if name == "vllm" else {}
        print_rows(name, import_module(f"sims.bench.{name}").run(**options), as_json=arguments.json)


if __name__ == "__main__":
    main()
