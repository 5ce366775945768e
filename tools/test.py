"""The same as `visadapt test`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["test", *sys.argv[1:]]))
