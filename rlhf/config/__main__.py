"""`python -m rlhf.config RECIPE [key.sub=value ...]` prints the resolved recipe and its batch arithmetic."""

import sys

from rlhf.config import batch_arithmetic, load_config, to_yaml


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m rlhf.config RECIPE [key.sub=value ...]\nPrints the resolved recipe.")
        return 0 if arguments else 2
    try:
        config = load_config(arguments[0], arguments[1:])
        rows = batch_arithmetic(config, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to_yaml(config), end="")
    if rows:
        print("# on one rank:")
        for quantity, value in rows:
            print(f"#   {quantity}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
