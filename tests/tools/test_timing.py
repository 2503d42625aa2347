import subprocess
import sys
import time

from tools.timing import cpu_seconds


def test_cpu_time_of_a_started_process_counts():
    loop = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(loop, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before, own, end = cpu_seconds(), time.process_time(), time.monotonic() + 60
        try:
            while cpu_seconds() - before - (time.process_time() - own) < 0.1:
                assert time.monotonic() < end
                time.sleep(0.02)
        finally:
            process.kill()
