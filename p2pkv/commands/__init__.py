"""What the commands of `p2pkv` do; `cli.py` says how they are called. Nothing here is imported before its command runs."""
