"""The console script, also ``python -m jaxmem``: the command line, where its packages are installed."""

import io
import sys

from jaxmem.extras import MissingExtra, require


def main() -> int:
    """Run the command line and return its exit code, or say what it misses and return 2."""
    try:
        require("audit", "the command line")
    except MissingExtra as error:
        print(f"jaxmem: {error}", file=sys.stderr)
        return 2
    from jaxmem import cli

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters ends no run
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
