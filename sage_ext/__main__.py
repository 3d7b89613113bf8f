"""`python -m sage_ext`: the command line; without a subcommand, `info`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"]))
