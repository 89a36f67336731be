"""``python -m pipeline``, in the repository's root: the same as the command ``shardferry``."""

import sys

from shardferry.pipeline.cli import main

sys.exit(main())
