"""One run on two hosts: network namespaces that only a cable (veth) connects."""

import os
import shutil
import subprocess
import sys

import pytest
from ranks import TINY
from tiny_runs import learned, same

pytestmark = pytest.mark.cluster
HOSTS = {"bt-host-a": "10.213.7.1", "bt-host-b": "10.213.7.2"}
FIRST = next(iter(HOSTS.values()))


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """{name: address} of two connected namespaces; the cable's ends are called veth0."""
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", "bt-host-a").returncode:
        pytest.skip("needs root, iproute2 and the right to make network namespaces")
    try:
        ip("netns", "add", "bt-host-b")
        cable = "link add veth0 netns bt-host-a type veth peer name veth0 netns bt-host-b"
        assert ip(*cable.split()).returncode == 0
        for name, address in HOSTS.items():
            for words in (
                f"addr add {address}/24 dev veth0",
                "link set veth0 up",
                "link set lo up",
            ):
                assert ip("-n", name, *words.split()).returncode == 0
        yield HOSTS
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


def test_two_hosts_are_one_run(two_hosts, small_beton, tmp_path):
    flags = [*TINY, "--epochs=2", "--data", str(small_beton)]
    processes = []
    for name, address in two_hosts.items():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        torchrun += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={FIRST}:29511"]
        torchrun += ["--rdzv-id=two", f"--rdzv-conf=is_host={address == FIRST}"]
        torchrun += [f"--local-addr={address}", "-m", "bt_fast.cli", "pretrain", *flags]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *torchrun, "--run-dir", str(tmp_path / "two")],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 8/8" in outputs[0] + outputs[1]  # every save compared the ranks' weights

    here = [sys.executable, "-m", "bt_fast.cli", "pretrain", *flags, "--gpus", "2"]
    subprocess.run([*here, "--run-dir", str(tmp_path / "here")], check=True, capture_output=True)
    assert same(learned(tmp_path / "two"), learned(tmp_path / "here"))
