"""The parts of `docs/protocol.md` that code says better: the two ends' states as diagrams, and which mutant breaks which rule.

`./dev sim protocol` prints them, to be put there; a test holds the document to them.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from p2pkv.core.moves.tables import SOURCE, TARGET, SourceState, TargetState
from sims.mutants import MUTANTS

State = TypeVar("State", bound=Enum)
Input = TypeVar("Input", bound=Enum)

_GROUPS = "PFTECSRIL"
"""Rules in the order of the document, as far as that has an order: moves first."""


def diagram(first: State, table: Mapping[State, Mapping[Input, State]]) -> str:
    """A table of states as a Mermaid diagram, for documents."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for state, following in table.items():
        lines += [f"    {state.name} --> {after.name}: {what.name}" for what, after in following.items()]
        lines += [] if following else [f"    {state.name} --> [*]"]
    return "\n".join([*lines, "```"])


def source_diagram() -> str:
    """The end that gives."""
    return diagram(SourceState.OFFERED, SOURCE)


def target_diagram() -> str:
    """The end that gets."""
    return diagram(TargetState.COLLECTING, TARGET)


def mutant_table() -> str:
    """Every mutant: the rule that it breaks, what it does wrong, and what is known to catch it."""
    lines = ["| rule | mutant | what it does wrong | caught by |", "|---|---|---|---|"]
    for name, mutant in sorted(MUTANTS.items(), key=lambda each: _place(each[1].rule)):
        early = ", a time over too soon" if mutant.early else ""
        searched = f"; search: `{mutant.kind}`{early}" if mutant.kind else ""
        lines.append(f"| {mutant.rule} | `{name}` | {mutant.description} | `{mutant.scenario}`{searched} |")
    return "\n".join(lines)


def _place(rule: str) -> tuple[int, int]:
    return _GROUPS.index(rule[0]), int(rule[1:])


def all_parts() -> str:
    """All of it, in the document's order."""
    return "\n\n".join((source_diagram(), target_diagram(), mutant_table()))
