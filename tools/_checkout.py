"""Imported first by every script here: puts the checkout on sys.path in place of this folder.

Python puts a script's folder first on sys.path, and there `profile.py` would hide the standard
library's `profile`, which torch.compile needs.
"""

import sys
from pathlib import Path

_TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(_TOOLS.parent), *(p for p in sys.path if Path(p).resolve() != _TOOLS)]
