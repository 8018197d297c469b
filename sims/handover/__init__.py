"""The hand-over, searched exhaustively: real state machines, every order of what can happen to a few of them."""
