"""``python -m fastmae.train``, for launchers such as torchrun that take a module, and the program ``fastmae``."""

import sys

from fastmae.train.console import open_streams


def main() -> int:
    """The command line; Ctrl-C while its own modules are imported ends it, too, with one line."""
    open_streams()  # before any file is opened
    try:
        from fastmae.train.cli.main import main as run
    except KeyboardInterrupt:
        print("fastmae: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
