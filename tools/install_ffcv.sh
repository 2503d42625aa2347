#!/bin/sh
# Build ffcv (no wheel exists) for the Python given as the first argument, with the Debian
# packages it needs where we may install them. Never fails: ffcv is optional.
python=$1

have() { pkg-config --exists opencv4 && pkg-config --exists libturbojpeg; }

if "$python" -c "import ffcv" 2>/dev/null; then
    exit 0
fi
if ! have 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing the Debian packages ffcv is built with"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get -q update && apt-get -qq install --yes --no-install-recommends \
            g++ pkg-config libopencv-dev libturbojpeg0-dev; } >/dev/null 2>&1
    fi
fi
if have 2>/dev/null; then
    echo "Building ffcv"
    "$python" -m pip install --quiet --constraint constraints.txt ffcv numba && exit 0
    echo "ffcv did not build; its tests and benchmarks are skipped"
else
    echo "ffcv needs libopencv-dev, libturbojpeg0-dev and pkg-config; its tests are skipped"
fi
exit 0
