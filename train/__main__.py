"""``python -m fastmae.train``, for launchers such as torchrun that take a module, and the program ``fastmae``."""

import sys


def main() -> int:
    """The command line; Ctrl-C while its own modules are imported ends it, too, with one line."""
    try:
        from fastmae.train.cli import main as run
    except KeyboardInterrupt:
        print("fastmae: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
