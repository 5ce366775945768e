"""The same as `visadapt data`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
