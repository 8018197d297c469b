"""Whom to join the cluster through: found at the start, and again as long as nobody is linked."""

from collections.abc import Awaitable, Callable, Iterable

import trio

from p2pkv.core.events import SiblingsFound
from p2pkv.core.ids import Address
from p2pkv.net.driver import Driver

AGAIN_S = 10.0
"""Between two searches of a node that is alone. What a name stands for changes in minutes; failed dials are retried anyway."""


async def keep_joining(driver: Driver, find: Callable[[], Awaitable[Iterable[Address]]]) -> None:
    """Tell the machine whom to dial, and again while this node is alone, until cancelled.

    Args:
        driver: Of this node.
        find: Gives the addresses of nodes that may be there now.
    """
    driver.handle(SiblingsFound(tuple(await find())))
    while True:
        await trio.sleep(AGAIN_S)
        alive = [member for member in driver.machine.members() if member.state.is_living]
        if len(alive) <= 1:  # this node itself
            driver.handle(SiblingsFound(tuple(await find())))
