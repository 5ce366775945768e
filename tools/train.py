"""The same as `visadapt train`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
