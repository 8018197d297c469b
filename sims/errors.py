"""What people may have asked wrongly of the simulator."""


class ExperimentError(Exception):
    """An experiment, or its picture, can't be made as it was asked for; the text says why."""
