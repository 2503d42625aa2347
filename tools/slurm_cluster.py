"""Run a command with a Slurm cluster of two nodes, n1 and n2, on this machine.

    python tools/slurm_cluster.py COMMAND...      for example bash, then sinfo, sbatch, srun

The cluster has one partition, debug, and stops when the command ends. Requires root and Debian's
packages slurm-wlm and munge. A requeued job waits seconds instead of minutes.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_CONF = """
ClusterName=bt-fast
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of its previous start expire; the minimum is 5 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
KillWait=60
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
_PATH = os.environ["PATH"] + ":/usr/sbin"


def missing() -> str | None:
    """The missing requirement of the cluster, or None."""
    if os.geteuid():
        return "a local Slurm cluster requires root"
    absent = [p for p in ("munged", "slurmctld", "slurmd", "sbatch") if not _program(p)]
    return f"missing: {' '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Yields the environment for Slurm's commands and jobs."""
    with tempfile.TemporaryDirectory(prefix="bt-slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # required by munged
        ports = [stack.enter_context(socket.socket()) for _ in range(3)]
        for port in ports:
            port.bind(("127.0.0.1", 0))
        conf = folder / "slurm.conf"
        conf.write_text(
            _CONF.format(
                host=socket.gethostname().partition(".")[0],
                ports=[port.getsockname()[1] for port in ports],
                folder=folder,
            )
        )
        for port in ports:
            port.close()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        # The node names do not resolve; the ranks' rendezvous is on this machine.
        environment = {**os.environ, "SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1"}

        def daemon(*words: object) -> None:
            command = [_program(str(words[0])), *map(str, words[1:])]
            with open(folder / "daemons.log", "a") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        munge = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid"}
        munge |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        daemon("munged", "-F", *(f"--{flag}={folder / file}" for flag, file in munge.items()))
        _wait("munged", folder, lambda: (folder / "munge.socket").exists())
        daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            (folder / node).mkdir()
            daemon("slurmd", "-D", "-N", node)

        def slurm(command: str) -> str:
            words = command.split()
            return subprocess.run(words, env=environment, capture_output=True, text=True).stdout

        _wait("the nodes", folder, lambda: slurm("sinfo -h -o %D%t").strip() == "2idle")
        try:
            yield environment
        finally:
            slurm("scancel --user=root")
            _wait("the jobs' end", folder, lambda: not slurm("squeue -h"))


def _wait(event: str, folder: Path, ready) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{event}: timed out; {(folder / 'daemons.log').read_text()}")
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__.strip())
        sys.exit()
    if missing() or not sys.argv[1:]:
        print(missing() or __doc__.strip(), file=sys.stderr)
        sys.exit(2)
    with slurm_cluster() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
