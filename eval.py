"""Evaluate a finished run again: python eval.py run=<run directory>."""

import sys

from permlab.cli import main

if __name__ == "__main__":
    sys.exit(main("eval"))
