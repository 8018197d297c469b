"""The simulator: the same core on a virtual network under a virtual clock, every promise checked after every event."""
