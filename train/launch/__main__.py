"""``python -m fastmae.train.launch [NAME]``: the examples that come with fastmae, or the path of one, for cp."""

import sys
from pathlib import Path

EXAMPLES = {p.name: p for p in sorted(Path(__file__).parent.iterdir()) if p.suffix in (".sh", ".sbatch", ".yaml")}


def main(arguments: list[str]) -> int:
    """Print one path, or all of them with their first lines. Returns the exit code, 2 for an unknown name."""
    if arguments in (["--help"], ["-h"]):
        print("usage: python -m fastmae.train.launch [NAME]\n")
        print(f"List the examples that come with fastmae, or print the path of one, for cp: {', '.join(EXAMPLES)}")
        return 0
    if not arguments:
        for path in EXAMPLES.values():
            lines = path.read_text().splitlines()
            print(path, next(line for line in lines if line.startswith("# ")), sep="\n    ")
        return 0
    if len(arguments) > 1 or arguments[0] not in EXAMPLES:
        print(f"fastmae: NAME must be one of {', '.join(EXAMPLES)}, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    print(EXAMPLES[arguments[0]])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
