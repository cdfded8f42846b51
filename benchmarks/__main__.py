"""``python -m fastmae.benchmarks``."""

import sys

from fastmae.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
