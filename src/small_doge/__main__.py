"""`python -m small_doge` is the `doge` command, so that `accelerate launch -m small_doge …` works."""

import sys

from .cli import main

sys.exit(main())
