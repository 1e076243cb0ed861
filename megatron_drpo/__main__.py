"""`python -m megatron_drpo`: the same as the command `megatron-drpo`."""

import sys

from megatron_drpo.launch import main

if __name__ == "__main__":
    sys.exit(main())
