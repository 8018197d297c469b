"""A source as a process of its own, for tests that stop or kill it: `python -m tests.live.lane_source COUNT NBYTES RATE`.

It holds COUNT chunks of one shard of NBYTES, serves them over TCP at RATE bytes a second, and prints its port.
"""

import sys

import trio

from p2pkv.net.tcp_lane import RateLimit
from p2pkv.net.tcp_source import serve_tcp
from tests.live.lane_ends import Source, chunk_of


async def main() -> None:
    count, nbytes, nbytes_per_s = map(int, sys.argv[1:])
    chunks = [chunk_of(number, nbytes=nbytes) for number in range(count)]
    source = Source()
    source.hold(*chunks)
    source.grant(*chunks)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    sys.stdout.write(f"{listener.socket.getsockname()[1]}\n")
    sys.stdout.flush()
    await serve_tcp(listener, source.grants.get, source.store, RateLimit(nbytes_per_s))


if __name__ == "__main__":
    trio.run(main)
