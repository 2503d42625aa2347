"""Training and evaluation need no network, and write only into the given folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_beton

COMMON = ["--device=cpu", "--precision=fp32"]

# Guards all connections, checks that the guard works, then runs the commands in argv.
GUARDED = """
import ipaddress, json, socket, sys

requested = []

def is_local(host):
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def guarded(real, host_of):
    def call(*arguments, **options):
        host = host_of(*arguments)
        if not is_local(host):
            requested.append(host)
            raise OSError(f"no network: {host}")
        return real(*arguments, **options)
    return call

def host_of(connection, address):
    return address[0] if isinstance(address, tuple) else None

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name), host_of))
socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *_: host)

for connect in (
    lambda: socket.socket().connect(("192.0.2.1", 9)),
    lambda: socket.create_connection(("example.org", 80), timeout=1),
):
    try:
        connect()
    except OSError as error:
        assert "no network" in str(error)
assert requested == ["192.0.2.1", "example.org"]
requested.clear()

from bt_fast.cli import main

for command in json.loads(sys.argv[1]):
    assert main(command) == 0
sys.exit(f"requested {requested}" if requested else 0)
"""

# Default caches of libraries, which docs/security.md lists.
CACHES = (
    *("home/.cache/matplotlib/", "home/.config/matplotlib/"),
    *("tmp/torchinductor_", "home/.triton/", "home/.nv/"),
)


@pytest.mark.slow
def test_training_and_evaluation_need_no_network_and_write_into_the_given_folder(tmp_path):
    data = write_beton(tmp_path / "data.beton", 40)
    for folder in ("home", "tmp", "elsewhere"):
        (tmp_path / folder).mkdir()
    flags = ["--recipe=demo", *COMMON, "--size=32", "--batch-size=16", "--workers=1"]
    flags += ["--epochs=1", "--projector", "32", "16", "--data", str(data)]
    commands = [
        ["pretrain", *flags, "--run-dir", "run"],
        ["eval", "knn", "run", *COMMON, "--workers=1"],
    ]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Without even a loopback device, where permitted.
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        alone = []
    before = tree(tmp_path)
    done = subprocess.run(
        [*alone, sys.executable, "-c", GUARDED, json.dumps(commands)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = tree(tmp_path) - before
    assert "elsewhere/run/encoder.safetensors" in written
    assert not {name for name in written if not name.startswith(("elsewhere/run/", *CACHES))}
    assert before <= tree(tmp_path)


def tree(root: Path) -> set[str]:
    """Relative paths of all files below a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
