"""``python -m unisono``, and so ``torchrun -m unisono``: the command line."""

import sys

from unisono.cli import main

if __name__ == "__main__":
    sys.exit(main())
