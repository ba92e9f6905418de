"""The socket of orders ahead: who reads an order has it, be that the worker or the front.

Runs in the front; the worker's side is ``worker/ahead.py``.
"""

from __future__ import annotations

import contextlib
import socket

from .. import wire

_PACKET_BYTES = 64 * 1024  # more than any has


class AheadSocket:
    """Both ends of a socket of packets, of which the worker has the reading one, too."""

    def __init__(self) -> None:
        self._decoder = wire.FrameDecoder(wire.MAX_AHEAD_BYTES)
        self._writing, self._reading = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def share(self, channel: socket.socket) -> None:
        """Send the reading end to the worker."""
        socket.send_fds(channel, [b"\0"], [self._reading.fileno()])

    def put(self, order: wire.Run, given: bytes) -> bool:
        """Lay down an order, with its input; return whether there was room."""
        try:
            self._writing.send(wire.encode_frame(order, given), socket.MSG_DONTWAIT)
        except OSError:  # the worker has enough (EAGAIN), or the kernel has no room
            return False
        return True

    def take_back(self, most: int) -> list[int]:
        """Take out so many orders at most, the first ones that are there; return their numbers.

        The worker may take one in between.
        """
        runs: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while len(runs) < most:
                packet = self._reading.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
                for order, _ in self._decoder.feed(packet):
                    assert isinstance(order, wire.Run)
                    runs.append(order.run)
        return runs

    def close(self) -> None:
        """Give both ends back."""
        self._writing.close()
        self._reading.close()
