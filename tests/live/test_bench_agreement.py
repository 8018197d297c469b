"""`./dev bench agreement` in small: its own checks hold, and it measures what it says."""

import pytest

from sims.bench.agreement import PROMPT_CHUNKS, run

pytestmark = [pytest.mark.live, pytest.mark.long]


def test_three_nodes_agree_after_the_last_ones_join() -> None:
    agreed, stored, memory = run(nodes=3, chunks=3 * PROMPT_CHUNKS)
    assert 0 < stored.median <= agreed.median < 10
    assert len(memory.values) == 3
    assert "900 entries" in agreed.name
