"""``python -m pipeline``: the same as the command ``shardferry``."""

import sys

from pipeline.cli import main

sys.exit(main())
