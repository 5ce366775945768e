"""The same as `visadapt bench`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
