"""Chaos: real nodes under random moves, copies, pins, evictions, kills and pauses, and a ledger of what may not be lost."""
