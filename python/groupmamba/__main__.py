# SPDX-License-Identifier: Apache-2.0
"""``python -m groupmamba`` is the console command ``groupmamba``."""

import sys

from groupmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
