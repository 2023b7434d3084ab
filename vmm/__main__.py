"""`python -m vmm` is the same as `vmm`."""

from __future__ import annotations

import sys

from vmm.cli import main

sys.exit(main())
