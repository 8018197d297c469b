"""`python -m p2pkv` is `p2pkv`."""

from p2pkv.cli import main

main()
