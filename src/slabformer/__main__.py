"""``python -m slabformer`` is ``slab``."""

import sys

from slabformer.cli.main import main

sys.exit(main())
