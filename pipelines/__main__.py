"""The command `bt-convert`; also `python -m pipelines` in a checkout that is not installed."""

import signal
import sys


def main() -> int:
    """Run bt-convert; Ctrl-C prints one line, also while modules are imported."""
    try:
        from pipelines.convert.command import main as convert

        return convert()
    except KeyboardInterrupt:
        print("bt-convert: stopped by SIGINT; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
