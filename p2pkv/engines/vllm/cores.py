"""Our threads, off the cores that vLLM on CPUs binds a worker to.

It has OpenMP bind the worker's first thread to the cores that the model is computed on, and whatever that thread starts
inherits them: our threads, and the node. There they would take turns with the model.

Rules:
    Only what vLLM had OpenMP bind is undone. In the cores that an operator or a NUMA policy has chosen, all stays.
    A thread that has left computes alone. A parallel region of its own would start a second team on the model's cores, and
    OpenMP would bind the thread to them once more.
"""

import ctypes
import os
from contextlib import suppress
from multiprocessing import parent_process

import torch

from p2pkv.engines.autostart import OPENMP_BINDINGS


def leave_bound_cores() -> None:
    """Let this thread, and what it starts from now on, run wherever vLLM might before it bound this process."""
    parent = parent_process()
    if parent is None or parent.pid is None or not any(name in os.environ for name in OPENMP_BINDINGS):
        return  # vLLM sets them for its workers only
    torch.get_num_threads()  # its first call in a thread sets OpenMP's number, which would overrule the next lines
    openmp = ctypes.CDLL(None)
    if hasattr(openmp, "omp_set_num_threads"):
        openmp.omp_set_num_threads(1)  # of this thread; `torch.set_num_threads` would set the model's too
    if hasattr(os, "sched_setaffinity"):  # after OpenMP has heard of the thread, for Intel's binds it then
        with suppress(OSError):  # the parent has ended, or none of its cores is allowed to us
            os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(parent.pid))
