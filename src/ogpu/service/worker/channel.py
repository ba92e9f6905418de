"""A worker's end of its channel to the front: frames in, frames out, whichever thread sends.

Runs in a worker.
"""

from __future__ import annotations

import socket
import threading

from .. import wire

_LARGE_BYTES = 64 * 1024


class Channel:
    """Sends frames whole, also where a message that must not wait is caught in the middle."""

    def __init__(self, channel: socket.socket) -> None:
        self.socket = channel
        self._rest = b""
        self._sending = threading.Lock()  # the worker's own: no other process knows of it

    def send(self, message: wire.Message, payload: bytes = b"") -> None:
        """Send a message; wait until the front has room for it."""
        with self._sending:
            head = self._rest + wire.encode_head(message, len(payload))
            self._rest = b""
            if len(payload) < _LARGE_BYTES:
                self.socket.sendall(head + payload)
            else:  # another system call costs less than another copy
                self.socket.sendall(head)
                self.socket.sendall(payload)

    def send_or_drop(self, message: wire.Message) -> None:
        """Send a message if that takes no waiting; drop it where it would."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            # A frame that was begun has to be ended before another one.
            frame = self._rest or wire.encode_frame(message)
            sent = self.socket.send(frame, socket.MSG_DONTWAIT)
            self._rest = frame[sent:]
        except BlockingIOError:
            return
        finally:
            self._sending.release()
