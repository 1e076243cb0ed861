"""`python tools/doctor.py`: the doctor of a checkout, as `python -m megatron_drpo.doctor` is of an
installation."""

import sys

from megatron_drpo.doctor import main

if __name__ == "__main__":
    sys.exit(main())
