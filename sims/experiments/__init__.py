"""Experiments: the cluster's figures, each by one command, from the real machines in the virtual world."""
