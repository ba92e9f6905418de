"""A worker's side of the orders ahead: what it may take next, without a word from the front.

Runs in a worker. The front has the same end of the socket, and may take an order back as long as
nobody has read it (``pool/ahead.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time

from .. import wire
from ..errors import WireError

_LEAST_KEPT = 100  # out of the way of sources that close the first few


class OrdersAhead:
    """Takes orders ahead.

    Args:
        channel: on it the front sends the descriptor, before anything else.
    """

    def __init__(self, channel: socket.socket) -> None:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
        # None: the front has gone, or there was no room for the descriptor.
        self._socket: socket.socket | None = None
        if descriptors:
            (descriptor,) = descriptors
            with contextlib.suppress(OSError):  # a source may have used up all of them
                kept = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LEAST_KEPT)
                os.close(descriptor)
                descriptor = kept
            self._socket = socket.socket(fileno=descriptor)
        self._decoder = wire.FrameDecoder(wire.MAX_AHEAD_BYTES)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._socket is not None:
            self._socket.close()

    def take(self) -> tuple[wire.Run, bytes] | None:
        """Take the next order, with its input, and start its clock; None: there is none."""
        if self._socket is None:
            return None
        try:
            count = self._socket.recv_into(self._decoder.buffer(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:  # the source has closed it: orders come by the channel alone
            self._socket.detach()
            self._socket = None
            return None
        for order, given in self._decoder.filled(count):
            if not isinstance(order, wire.Run):
                raise WireError(f"a worker cannot do {order}")
            if order.timeout_s is not None:
                order.deadline_at = time.time() + order.timeout_s
                order.deadline_s = time.monotonic() + order.timeout_s
            return order, given
        return None
