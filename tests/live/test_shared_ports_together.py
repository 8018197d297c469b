"""One listening socket in several processes: what one of them sets on it, all of them have."""

import os
import socket

import pytest
import trio

from p2pkv.core.ids import Address
from p2pkv.net.shared_ports import SharedPorts
from tests.live.command_line import free_port

pytestmark = pytest.mark.live


async def test_a_node_that_opens_a_shared_port_never_makes_it_blocking_for_those_that_accept_there() -> None:
    """A sibling whose `accept` finds nobody while the socket is blocking stands still until the next connection."""
    was_blocking: list[bool] = []

    async def door(  # noqa: ASYNC114 - it ends by itself
        listener: socket.socket, *, task_status: trio.TaskStatus[None]
    ) -> None:
        with listener:
            was_blocking.append(os.get_blocking(listener.fileno()))
        task_status.started()

    with SharedPorts({"controller_http_url": Address("127.0.0.1", free_port())}, list) as ports:
        assert await ports.acquire() == {}
        await ports.serve({"controller_http_url": door}, lambda: None)
    assert was_blocking == [False]
