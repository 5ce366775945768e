"""The same as `visadapt merge`."""

from __future__ import annotations

import sys

from visadapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
