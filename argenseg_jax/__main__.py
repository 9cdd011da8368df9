"""`python -m argenseg_jax CMD`: hands over to the command line."""

from argenseg_jax.cli.__main__ import entry

if __name__ == "__main__":
    entry()
