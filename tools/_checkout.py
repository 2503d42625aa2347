"""Puts the checkout first and this folder last on sys.path; every script imports this module first.

Python puts a script's folder first, where `profile.py` would hide the standard library's `profile`,
which torch.compile imports. (The folder stays on the path for worker processes.)
"""

import sys
from pathlib import Path

_TOOLS = Path(__file__).resolve().parent
_OTHERS = [p for p in sys.path if Path(p).resolve() not in (_TOOLS, _TOOLS.parent)]
sys.path[:] = [str(_TOOLS.parent), *_OTHERS, str(_TOOLS)]
