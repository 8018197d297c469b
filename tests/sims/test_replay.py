"""The replay of a trace, on traces small enough to count by hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pkv.core.gossip import FLUSH_S
from p2pkv.core.messages import CHANGE_NBYTES, InventoryDelta
from p2pkv.wire.codec import peer_codec
from sims.__main__ import app
from sims.errors import ExperimentError
from sims.experiments.replay import Served, prefix_affine, replay, round_robin
from sims.trace import CHUNK_TOKENS, GENERATION, Instance, Request, read_trace


def request(at: float, *chunk_ids: int, tokens: int | None = None) -> Request:
    return Request(at, CHUNK_TOKENS * len(chunk_ids) if tokens is None else tokens, chunk_ids)


def write(path: Path, *requests: Request) -> Path:
    lines = [{"timestamp": each.at * 1000, "input_length": each.tokens, "hash_ids": each.chunk_ids} for each in requests]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def delta_nbytes(first_sequence: int, changes: int) -> int:
    return len(peer_codec().encode(InventoryDelta(GENERATION, first_sequence, bytes(changes * CHANGE_NBYTES))))


FIVE = (
    request(0.0, 1, 2, 3),
    request(1.0, 1, 2, 4),  # two chunks are held, by the other instance
    request(2.0, 1, 2, 3, 5, tokens=4 * CHUNK_TOKENS - 100),  # three, by this one
    request(2.0 + FLUSH_S / 2, 1, 2, 4, 6),  # three, by this one
    request(3.0, 1, 2, 3, 5, tokens=4 * CHUNK_TOKENS - 100),  # all, by this one
)


def test_hits_changes_and_messages_are_counted() -> None:
    served = Served(2, capacity=4)
    served.run(FIVE, round_robin(FIVE, 2))
    assert served.request_counts == {0: 3, 1: 2}
    assert served.local_tokens == CHUNK_TOKENS * (3 + 3 + 4) - 100
    assert served.anywhere_tokens == CHUNK_TOKENS * (2 + 3 + 3 + 4) - 100
    assert [instance.inventory.sequence for instance in served.instances] == [4, 4]
    assert served.message_count == 4
    nbytes = delta_nbytes(1, 3) + delta_nbytes(4, 1)
    assert served.sent_nbytes == {0: nbytes, 1: nbytes}
    assert served.delivered == {0: delta_nbytes(1, 3), 1: delta_nbytes(1, 3), 2: 2 * delta_nbytes(4, 1)}
    assert [view.entry_count for view in served.views] == [0, 4]
    assert served.is_view_right()


def test_what_changes_within_a_flush_goes_together() -> None:
    served = Served(2, capacity=8)
    served.run([request(0.0, 1), request(FLUSH_S / 2, 2), request(FLUSH_S, 3)], [1, 1, 1])
    assert served.message_count == 2
    assert served.sent_nbytes == {1: delta_nbytes(1, 2) + delta_nbytes(3, 1)}


def test_a_view_that_is_wrong_is_found() -> None:
    served = Served(2, capacity=8)
    served.run([request(0.0, 1, 2)], [1])
    assert served.is_view_right()
    served.instances[1].store(request(1.0, 3))
    assert not served.is_view_right()


def test_the_coldest_goes_first_and_suffixes_before_prefixes() -> None:
    instance = Instance(4)
    assert instance.store(request(0.0, 1, 2, 3)) == ([1, 2, 3], [])
    assert instance.store(request(1.0, 1, 9)) == ([9], [])
    assert instance.store(request(2.0, 1, 8)) == ([8], [3])
    assert instance.store(request(3.0, 1, 7)) == ([7], [2])
    assert instance.store(request(4.0, 1, 6)) == ([6], [9])
    assert instance.store(request(5.0, 11, 12, 13, 14, 15, 16)) == ([11, 12, 13, 14], [8, 7, 6, 1])
    assert len(instance.inventory.entries) == 4


def test_all_of_a_conversation_goes_to_one_instance() -> None:
    requests = [request(0.0, 0, each % 20, 100 + each) for each in range(100)]
    route = prefix_affine(requests, 8)
    assert all(len({route[index] for index in range(first, 100, 20)}) == 1 for first in range(20))
    assert len(set(route)) > 3
    assert round_robin(requests, 8)[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


def test_it_reports_each_size_and_way(tmp_path: Path) -> None:
    found = replay(write(tmp_path / "trace.jsonl", *FIVE), (2, 4))
    total = sum(each.tokens for each in FIVE)
    assert found["hits of one cache that never forgets"] == pytest.approx(100 * (CHUNK_TOKENS * 12 - 100) / total)
    assert found["2 instances, round robin: hits anywhere"] == found["hits of one cache that never forgets"]
    assert found["2 instances, round robin: inventory changes a second and node"] == pytest.approx(4 / 3)
    assert found["4 instances, round robin: rows in one's view"] == 3 + 4 + 4
    assert found["4 instances, prefix-affine: views that are wrong at the end"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "[1]\n",
        "not json\n",
        '{"timestamp": 0, "input_length": 0, "hash_ids": []}\n',
        '{"timestamp": 0, "input_length": 600, "hash_ids": [1]}\n',
        '{"timestamp": 1, "input_length": 9, "hash_ids": [1]}\n{"timestamp": 0, "input_length": 9, "hash_ids": [1]}\n',
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=r"trace\.jsonl"):
        read_trace(path)


def test_rates_over_no_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="at once"):
        replay(write(tmp_path / "trace.jsonl", request(1.0, 1)), (2,))


def test_the_tool_wants_a_trace_that_exists(tmp_path: Path) -> None:
    for arguments in ([], ["--trace", str(tmp_path / "none.jsonl")]):
        refused = CliRunner().invoke(app, ["replay", *arguments])
        assert refused.exit_code == 2
        assert (arguments or ["--trace"])[-1] in refused.stderr
