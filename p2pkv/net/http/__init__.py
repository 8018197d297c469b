"""The HTTP shim: LMCache's calls and ours, the same on every node."""
