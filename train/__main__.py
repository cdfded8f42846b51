"""``python -m fastmae.train``: the command line, for launchers such as torchrun that take a module."""

import sys

from fastmae.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
