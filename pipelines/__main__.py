"""`python -m pipelines`: the command `bt-convert`, also in a checkout that is not installed."""

import sys

from pipelines.stop import bt_convert

if __name__ == "__main__":
    sys.exit(bt_convert())
