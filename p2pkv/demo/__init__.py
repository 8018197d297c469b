"""`p2pkv demo`: the seed's walk-through with real processes, what it saw, and whether that is what should be seen."""

from p2pkv.demo.reference import ReferenceWalkthrough
from p2pkv.demo.vllm import VllmWalkthrough
from p2pkv.demo.walkthrough import run_demo

__all__ = ["ReferenceWalkthrough", "VllmWalkthrough", "run_demo"]
