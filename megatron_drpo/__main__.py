"""`python -m megatron_drpo`: the command line without a checkout."""

import sys

from megatron_drpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
