"""`python -m bt_fast`: the command `bt-fast`, also in a checkout that is not installed."""

import sys

from bt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
