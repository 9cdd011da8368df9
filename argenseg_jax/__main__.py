"""`python -m argenseg_jax CMD`: hands over to the command line."""
import sys

from argenseg_jax.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
