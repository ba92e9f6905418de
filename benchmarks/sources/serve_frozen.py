"""The chosen handler on the frozen thread-based module, by serve_ogpu.py, unchanged.

The module listens on 0.0.0.0:5555 and has no setting for either, but start() reads both from the
module that it is in. They are replaced before the source runs; nothing else is.
"""

import os
import runpy
from pathlib import Path

from ogpu.service import server

if __name__ == "__main__":
    server.SERVICE_HOST = "127.0.0.1"
    server.SERVICE_PORT = int(os.environ["BENCHMARK_PORT"])
    runpy.run_path(str(Path(__file__).with_name("serve_ogpu.py")), run_name="__main__")
