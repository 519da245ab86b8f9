"""`python -m vlv.cli` is the command `vlv`, for launchers that start a module."""

import sys

from .main import main

if __name__ == "__main__":  # processes that read images import this module, too
    sys.exit(main())
