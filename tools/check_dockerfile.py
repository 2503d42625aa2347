"""Run the Dockerfile's steps without Docker: each stage in a separate root, under chroot.

    debootstrap --variant=minbase --include=ca-certificates bookworm ROOT   # as root
    unshare --mount python tools/check_dockerfile.py --root ROOT --scratch FOLDER

ROOT replaces the image that FROM names. Stages are layers over it (overlayfs), the build context is
filtered by .dockerignore, and the entry point is started as in the image: as its user, as process
1, in its folder. SIGTERM must reach a training run. Requires root and about 20 GB in FOLDER, which
is removed at the end; the output of the steps is written to check_dockerfile.log. (unshare ensures
that nothing stays mounted.)
"""

import _checkout  # noqa: F401  # isort: skip

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bt_fast.cli import run_command
from bt_fast.distributed.signals import EXIT_STOPPED
from pipelines.common.flags import parse_flags
from tools.dockerfile import Stage, context, copied, parse

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Run the steps of the Dockerfile under chroot."""

    root: Path
    """Folder of a new Debian system, created by debootstrap."""
    scratch: Path
    """Folder for the stages; must not exist."""
    bind: tuple[Path, ...] = ()
    """Folders of this machine that steps may read, such as a local index of wheels."""
    log: Path = Path("check_dockerfile.log")
    """File for the output of the steps."""


class Builder:
    """Builds stages in sequence; each is an overlay whose layers are kept."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.layers: dict[str, list[Path]] = {}  # of each stage, the topmost first
        self.mounted: list[Path] = []
        self.environment: dict[str, str] = {}
        self.user, self.folder = "0:0", "/"
        self.log = open(check.log, "w")  # noqa: SIM115 (closed with the process)

    def build(self, stage: Stage) -> Path:
        """Run a stage's steps; returns its root."""
        below = self.layers.get(stage.base, [self.check.root.resolve()])
        upper, work, root = (self.check.scratch.resolve() / stage.name / n for n in "uwr")
        for path in (upper, work, root):
            path.mkdir(parents=True)
        layers = f"lowerdir={':'.join(map(str, below))},upperdir={upper},workdir={work}"
        self.mount(root, "-t", "overlay", "overlay", "-o", layers)
        self.layers[stage.name] = [upper, *below]
        self.prepare(root)
        if stage.base not in self.layers:
            self.environment, self.user, self.folder = {}, "0:0", "/"
        for instruction, text in stage.steps:
            print(f"{stage.name}: {instruction} {text[:80]}", flush=True)
            started = time.monotonic()
            self.step(root, instruction, text)
            if instruction == "RUN":
                print(f"    {time.monotonic() - started:.0f} s", flush=True)
        size = subprocess.run(["du", "-sm", upper], capture_output=True, text=True).stdout
        print(f"{stage.name}: {size.split()[0]} MB in its layers", flush=True)
        return root

    def prepare(self, root: Path) -> None:
        """Add what Docker provides besides the image: devices, a resolver, this machine's CAs."""
        self.mount(root / "proc", "-t", "proc", "proc")
        self.mount(root / "dev", "-t", "tmpfs", "tmpfs")
        (root / "dev" / "shm").mkdir()
        (root / "dev" / "shm").chmod(0o1777)
        for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
            os.mknod(root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (root / "dev" / name).chmod(0o666)
        for name in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
            if Path(name).exists():
                (root / name[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(name, root / name[1:])
        for path in self.check.bind:
            (root / str(path)[1:]).mkdir(parents=True, exist_ok=True)
            self.mount(root / str(path)[1:], "--bind", "-o", "ro", str(path))

    def step(self, root: Path, instruction: str, text: str) -> None:
        if instruction == "RUN":
            command = self.inside(root, ["/bin/sh", "-c", text])
            if subprocess.run(command, stdout=self.log, stderr=self.log).returncode:
                raise ValueError(f"RUN failed; see {self.check.log}: {text}")
        elif instruction == "COPY":
            self.copy(root, *copied(text))
        elif instruction == "ENV":
            self.environment |= dict(word.split("=", 1) for word in shlex.split(text))
        elif instruction == "WORKDIR":
            self.folder = text
            (root / text[1:]).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            self.user = text

    def copy(self, root: Path, stage: str | None, sources: list[str], destination: str) -> None:
        target = root / str(PurePosixPath(self.folder, destination))[1:]
        for source in sources:
            if stage is not None:
                origin = self.check.scratch.resolve() / stage / "r" / source[1:]
                shutil.copytree(origin, target, symlinks=True, dirs_exist_ok=True)
                continue
            files = [f for f in context(ROOT) if PurePosixPath(source) in (f, *f.parents)]
            if not files:
                raise ValueError(f"COPY {source}: the build context does not contain it")
            for file in files:
                within = file.name if str(file) == source else file.relative_to(source)
                (target / within).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, target / within)

    def inside(self, root: Path, command: list[str]) -> list[str]:
        """The command line that runs a command in a stage, with pip's settings of this process."""
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = {"PATH": path, "HOME": "/root", **settings, **self.environment}
        user = ["--userspec", self.user, "--groups", self.user.partition(":")[2] or "0"]
        enter = f'cd {shlex.quote(self.folder)} && exec "$@"'
        pairs = [f"{name}={value}" for name, value in variables.items()]
        program = shutil.which("chroot") or "chroot"
        return [
            *["env", "-i", *pairs, program, *user, str(root)],
            *["/bin/sh", "-c", enter, "sh", *command],
        ]

    def mount(self, where: Path, *options: str) -> None:
        subprocess.run(["mount", *options, str(where)], check=True)
        self.mounted.append(where)

    def clean(self) -> None:
        for path in reversed(self.mounted):
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        shutil.rmtree(self.check.scratch)


def check_image(builder: Builder, root: Path, stage: Stage) -> None:
    """Check that the image runs its commands and responds to SIGTERM. Raises ValueError if not."""
    entry = json.loads(stage.last("ENTRYPOINT"))
    data = root / builder.folder[1:]
    checks = [
        json.loads(stage.last("CMD")),
        ["--version"],
        ["pretrain", "--dry-run", "--gpus", "32"],
    ]
    commands = [[*entry, *arguments] for arguments in checks]
    commands.append(["python", "-c", "import ffcv, nvidia.dali, sklearn, onnxscript, pyarrow"])
    commands.append(["sh", "-c", 'test "$(id -u)" != 0 && touch /data/mine && ! touch /opt/mine'])
    subprocess.run(
        [sys.executable, ROOT / "tools" / "make_demo_images.py", data / "images"]
        + ["--train", "256", "--val", "64", "--workers", "1"],
        check=True,
        stdout=builder.log,
    )
    commands.append(["bt-convert", "images", "out.beton", "--workers", "1"])
    for command in commands:
        done = subprocess.run(builder.inside(root, command), stdout=builder.log, stderr=builder.log)
        print(f"{' '.join(command)}: exit status {done.returncode}", flush=True)
        if done.returncode:
            raise ValueError(f"the image does not run this command; see {builder.log.name}")
    check_sigterm(builder, root, entry)


def check_sigterm(builder: Builder, root: Path, entry: list[str]) -> None:
    """Train as process 1 of a namespace and send it SIGTERM, as `docker stop` does."""
    flags = ["--recipe=demo", "--device=cpu", "--size=32", "--batch-size=32", "--epochs=1000"]
    flags += ["--projector", "32", "32", "--save-every=1", "--run-dir=run", "--workers=1"]
    inside = builder.inside(root, [*entry, "pretrain", *flags])
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", *inside], stdout=builder.log, stderr=builder.log
    )
    checkpoints = root / builder.folder[1:] / "run" / "checkpoints"
    while not any(checkpoints.glob("step-????????")):
        if process.poll() is not None:
            raise ValueError(f"training ended without a signal; see {builder.log.name}")
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    status = process.wait()
    print(f"SIGTERM to a run that is process 1: exit status {status}", flush=True)
    if status != EXIT_STOPPED:
        raise ValueError(f"the exit status should be {EXIT_STOPPED}")


def main() -> int:
    check = parse_flags(Check, "check_dockerfile.py", None)
    if os.geteuid():
        raise ValueError("chroot and mount require root; run it as root")
    if check.scratch.exists():
        raise ValueError(f"--scratch {check.scratch} exists; choose another folder")
    builder = Builder(check)
    try:
        stages = parse((ROOT / "Dockerfile").read_text())
        for stage in stages:
            root = builder.build(stage)
        check_image(builder, root, stages[-1])
    finally:
        builder.clean()
    print("all steps and all checks of the image succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("check_dockerfile.py", main))
