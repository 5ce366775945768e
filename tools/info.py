"""The same as `visadapt info`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
