"""``python -m ogpu.service``."""

import sys

from .cli import main

sys.exit(main())
