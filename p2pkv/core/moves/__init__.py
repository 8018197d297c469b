"""Moves of chunks between instances: a coordinator asks, a source plans and hands over, a target fetches and takes."""
