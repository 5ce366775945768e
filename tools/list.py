"""The same as `visadapt list`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["list", *sys.argv[1:]]))
