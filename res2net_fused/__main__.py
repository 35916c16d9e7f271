"""`python -m res2net_fused`."""

import sys

from .cli import main

sys.exit(main())
