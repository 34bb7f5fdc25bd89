"""Convert weights between layouts; the same as ``python -m accessory convert``."""

import sys

from accessory.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
