"""The shell's network side: the driver, links to peers, lanes, and the doors."""
