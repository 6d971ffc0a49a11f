"""``python -m wmtp``."""

import sys

from wmtp.cli import main

sys.exit(main())
