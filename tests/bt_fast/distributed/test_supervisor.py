"""The launcher, with ranks that run a line of Python."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_runs import wait_until

from bt_fast.distributed import launcher
from bt_fast.distributed.launcher import Placement
from bt_fast.distributed.rendezvous import RESTARTS
from bt_fast.distributed.signals import EXIT_STOPPED, STOP_SIGNALS, StopFlag


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Runs two ranks of some Python; each appends "RANK/RESTARTS" to a file when it starts."""
    monkeypatch.setenv(RESTARTS, "0")
    started, ready = tmp_path / "started", tmp_path / "ready"

    def run(program: str, how=launcher.run_processes, *arguments) -> tuple[int, list[str]]:
        text = (
            "import os, signal, sys, time\n"
            "rank, restarts = int(os.environ.get('RANK', 0)), int(os.environ['BT_FAST_RESTARTS'])\n"
            f"started, ready = {str(started)!r}, {str(ready)!r}\n"
            "open(started, 'a').write(f'{rank}/{restarts} ')\n" + program
        )
        monkeypatch.setattr(launcher, "_rank_command", lambda _: [sys.executable, "-c", text])
        with StopFlag() as stop:
            status = how(*(arguments or ([], 2)), stop)
        return status, sorted(started.read_text().split())

    return run


def test_all_restart_when_one_dies_and_the_other_does_not_notice(ranks, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_PERIOD", 1.0)
    program = (
        "if restarts == 0:\n"
        "    if rank == 0: time.sleep(3600)\n"
        "    while '0/0' not in open(started).read(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert ranks(program) == (0, ["0/0", "0/1", "1/0", "1/1"])
    assert "rank 1 ended with SIGKILL; restarting all ranks" in capfd.readouterr().err


def test_a_user_error_is_not_retried(ranks):
    assert ranks("sys.exit(2 if rank else 0)") == (2, ["0/0", "1/0"])


def test_a_run_that_keeps_failing_ends(ranks):
    with pytest.raises(ValueError, match="rank 0 ended with exit status 3, also after 3 restarts"):
        ranks("sys.exit(0 if rank else 3)")


STOPS = (
    "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
    "open(ready, 'a').write('x'); time.sleep(3600)"
)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_forwarded(ranks, hang_up, tmp_path, number):
    ready = tmp_path / "ready"

    def signal_when_ready() -> None:
        wait_until(lambda: ready.exists() and ready.read_text() == "xx")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=signal_when_ready)
    thread.start()
    assert ranks(STOPS) == (EXIT_STOPPED, ["0/0", "1/0"])
    thread.join()


def test_another_launcher_is_one_process(ranks):
    program = "assert sys.argv[1:] == []; sys.exit(75 if restarts else 137)"
    by_srun = Placement(num_ranks=2, num_local_gpus=0, srun=["env", "A=1"], on_gpus=False)
    status, started = ranks(program, launcher.start_ranks, by_srun, [])
    assert (status, started) == (EXIT_STOPPED, ["0/0", "0/1"])


def test_a_stop_before_the_first_start_starts_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert launcher.run_processes([], 2, stop) == EXIT_STOPPED


def test_ctrl_c_interrupts_until_there_is_something_to_save():
    with StopFlag() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: stop.requested)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
