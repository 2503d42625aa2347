"""Run the README's first commands and the first example of docs/library.md as installed.

    .venv/bin/python tools/try_wheel.py

Works in a temporary folder, with drawn images and a tiny model. Imports nothing of the checkout.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 160  # more than the demo's batch
TINY = shlex.split(
    "--device cpu --precision fp32 --encoder resnet18 --projector 32 16 --size 32 --batch-size 8"
    " --epochs 2 --warmup-epochs 1 --max-steps 2 --workers 1 --probe-every 0"
)


def first_block(path: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)[1]


def draw_images(folder: Path) -> None:
    for index in range(NUM_IMAGES):
        image = Image.new("RGB", (64, 64), (index, 255 - index, 128))
        ImageDraw.Draw(image).ellipse([index % 32, 8, index % 32 + 24, 48], fill=(255, index, 0))
        (folder / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"class{index % 2}" / f"{index:03}.jpg")


def run(*command: str | Path) -> None:
    print("$", shlex.join(map(str, command)), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    programs = Path(sys.executable).parent
    install, *commands = first_block("README.md", "console").splitlines()
    assert install == "$ pip install bt-fast" and len(commands) == 2
    draw_images(Path("imagenet/train"))
    for line in commands:
        program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
        run(programs / program, *arguments, *(TINY if arguments[0] == "pretrain" else []))
    Path("demo").mkdir()
    run(programs / "bt-convert", "imagenet/", "demo/out.beton")
    run(sys.executable, "-c", first_block("docs/library.md", "python"))
    print(*Path("runs").glob("*/encoder.safetensors"))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
