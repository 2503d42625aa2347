"""Imported first by every script here: puts the checkout first on sys.path and this folder last.

Python puts a script's folder first, and there `profile.py` would hide the standard library's
`profile`, which torch.compile needs. (Last it stays for worker processes, which import this again.)
"""

import sys
from pathlib import Path

_TOOLS = Path(__file__).resolve().parent
_OTHERS = [p for p in sys.path if Path(p).resolve() not in (_TOOLS, _TOOLS.parent)]
sys.path[:] = [str(_TOOLS.parent), *_OTHERS, str(_TOOLS)]
