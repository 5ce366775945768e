"""The same as `visadapt predict`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
