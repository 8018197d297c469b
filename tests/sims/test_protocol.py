"""What docs/protocol.md has of tables is what the code has."""

from pathlib import Path

import pytest

from p2pkv.core.moves.tables import SOURCE, TARGET
from sims.mutants import MUTANTS
from sims.protocol_parts import mutant_table, source_diagram, target_diagram

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


@pytest.mark.parametrize("part", [source_diagram, target_diagram, mutant_table], ids=lambda part: part.__name__)
def test_the_document_has_it_as_the_code_does(part: object) -> None:
    assert callable(part)
    assert part() in DOCUMENT, "put there what `./dev sim protocol` prints"


def test_a_diagram_has_each_way_from_state_to_state() -> None:
    for table, shown in ((SOURCE, source_diagram()), (TARGET, target_diagram())):
        ways = [f"{state.name} --> {after.name}: {what.name}" for state, row in table.items() for what, after in row.items()]
        assert [line.strip() for line in shown.splitlines() if ":" in line] == ways


def test_each_mutant_breaks_a_rule_of_the_document() -> None:
    for mutant in MUTANTS.values():
        assert f"**{mutant.rule}** " in DOCUMENT
