"""``python -m samv2_kernels.audit``."""

from __future__ import annotations

import sys

from samv2_kernels.audit.cli import main

if __name__ == "__main__":
    sys.exit(main())
