"""Device, precision and compile mode of a process, and torch's process-wide switches.

Switches are set by a call, never at import.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bt_fast.choices import Compile, Device, Precision
from bt_fast.distributed.collectives import ALONE, World
from pipelines import augment


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles bt-fast's kernels for the device: an NVIDIA GPU of
    sm_80 or newer. One that is only planned for, on a machine without GPUs, is taken for such."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or torch.version.hip:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def augmentation_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """The fastest form of `augment.apply` for crops on a device; same arguments."""
    if runs_triton(device):
        from pipelines.augment import triton as augment_triton

        return augment_triton.apply
    return augment.apply_in_threads if device.type == "cpu" else augment.apply


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, also on a CPU: slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How this process computes; the recipe decides what it computes."""

    device: torch.device
    precision: Literal["bf16", "fp32"]
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"]

    @property
    def view_dtype(self) -> torch.dtype:
        """Dtype of the augmented views."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def replays_graphs(self) -> bool:
        """Whether compiled functions are CUDA graphs, which overwrite their earlier results."""
        return self.compile in ("reduce-overhead", "max-autotune")

    def augmentation(self) -> Callable[[torch.Tensor, augment.Draw], torch.Tensor]:
        """`augment.apply` into `view_dtype`: by fused kernels on a GPU, by threads on a CPU."""
        return functools.partial(augmentation_on(self.device), dtype=self.view_dtype)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for each shape (a run has few) unless `compile` is off.

        The modes are torch.compile's: `reduce-overhead` and `max-autotune` replay CUDA graphs,
        which pays when the host cannot launch kernels as fast as the GPU finishes them.
        """
        if self.compile == "off":
            return function
        return torch.compile(function, dynamic=False, mode=self.compile)


def choose_runtime(
    device: Device,
    precision: Precision,
    compile: Compile,
    world: World = ALONE,
) -> Runtime:
    """Resolve `auto`, and bind this process to its GPU (see `gpu_index`).

    bf16 where the hardware multiplies it, fp32 elsewhere. torch.compile on CUDA only, because on
    a CPU compiling takes longer than a typical run; with CUDA graphs where `_can_replay_graphs`. On
    a GPU torch gets one CPU thread: the cores belong to the decoding workers.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no usable GPU here; try --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    if compile == "auto":
        with_graphs = _can_replay_graphs(world)
        compile = "off" if device == "cpu" else "reduce-overhead" if with_graphs else "default"
    if device == "cpu":
        return Runtime(device=torch.device("cpu"), precision=precision, compile=compile)
    gpu = torch.device("cuda", gpu_index(world.local_rank))
    torch.cuda.set_device(gpu)
    torch.set_num_threads(1)
    return Runtime(device=gpu, precision=precision, compile=compile)


def _can_replay_graphs(world: World) -> bool:
    """Whether CUDA graphs are known to work: with collectives they have not been tried on hardware,
    and torch before 2.14 replays them only in the thread that imported them."""
    has_collectives = world.size > 1 or world.single_rank_group
    return not has_collectives and threading.current_thread() is threading.main_thread()


def gpu_index(local_rank: int) -> int:
    """Index of the GPU of a rank of this machine: its only visible one, or the local rank.

    Raises ValueError if the rank has no GPU of its own.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 1 and visible is not None:  # a launcher shows each rank its own
        return 0
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but there are {count} GPUs (CUDA_VISIBLE_DEVICES is"
            f" {visible}); start one rank per GPU of each machine"
        )
    return local_rank


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bf16 natively."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def apply_switches(*, deterministic: bool = False) -> None:
    """Set the process-wide switches."""
    # Benchmarking convolutions finds the fastest, but not the same one in every process.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
        # Also for the compiler, which then benchmarks nothing. Operators without one warn.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # TF32 for the products that stay in float32 on a GPU: those of the loss, and with --precision
    # fp32 all. Its 10 bits of mantissa are as many as the released code's float16 has.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def prepare(model: torch.nn.Module, runtime: Runtime) -> None:
    """Move a model to its device in channels-last memory."""
    model.to(runtime.device).to(memory_format=torch.channels_last)


OUT_OF_MEMORY = (
    "not enough memory; choose a smaller --batch-size, --size or --projector, or for pretraining a"
    " larger --accumulate"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def synchronise(device: torch.device) -> None:
    """Wait for the device, to read a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
