"""Run a source, unchanged, on the frozen thread-based module: ``frozen.py SOURCE PORT``.

The module listens on 0.0.0.0:5555 and has no setting for either, but start() reads both from the
module that it is in. They are replaced before the source runs; nothing else is.
Runs in the environment that peer_frozen.py makes for it.
"""

import runpy
import sys

from ogpu.service import server

if __name__ == "__main__":
    server.SERVICE_HOST = "127.0.0.1"
    server.SERVICE_PORT = int(sys.argv[2])
    runpy.run_path(sys.argv[1], run_name="__main__")
