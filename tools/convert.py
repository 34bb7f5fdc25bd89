"""Convert weights between layouts; the same as ``python -m accessory convert``."""

import argparse
import sys

from accessory.cli.convert import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
