"""Every runtime switch, in one place, applied by a call and never at import."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipelines.augment import Draw, threads

Precision = Literal["auto", "bf16", "fp32"]
Compile = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How this process computes; what it computes is the recipe's business."""

    device: torch.device
    precision: Literal["bf16", "fp32"]
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"]

    @property
    def view_dtype(self) -> torch.dtype:
        """Dtype in which augmentation hands the views to the encoder."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def augment(self, images: torch.Tensor, parameters: Draw) -> torch.Tensor:
        """Distorted views, by the fused kernels on a GPU and by threads elsewhere."""
        if self.device.type == "cuda":
            from pipelines.augment import (
                triton as augment_triton,  # triton comes with torch's CUDA builds only
            )

            return augment_triton.apply(images, parameters, dtype=self.view_dtype)
        return threads.apply(images, parameters, dtype=self.view_dtype)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled for each shape it meets (a run has few), if so chosen.

        The modes are torch.compile's: `reduce-overhead` and `max-autotune` replay CUDA graphs,
        which pays when the host cannot launch kernels as fast as the GPU finishes them.
        """
        if self.compile == "off":
            return function
        return torch.compile(function, dynamic=False, mode=self.compile)


def choose_runtime(
    device: Literal["auto", "cpu", "cuda"],
    precision: Precision,
    compile: Compile,
    local_rank: int = 0,
) -> Runtime:
    """Settle what was left to `auto`. The local rank is the number of its GPU.

    bf16 where the hardware multiplies it, fp32 elsewhere; torch.compile on CUDA only, because on
    a CPU compiling takes longer than the runs a CPU is for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no usable GPU here; try --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    if compile == "auto":
        compile = "default" if device == "cuda" else "off"
    where = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        # The cores are the decoding threads': shared among threads, the little that the host
        # computes for a step would wait for each of them.
        torch.set_num_threads(1)
    return Runtime(device=where, precision=precision, compile=compile)


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bf16, rather than imitating it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def apply_switches(*, deterministic: bool = False) -> None:
    """Set the process-wide switches."""
    # Trying out convolutions finds the fastest, but not the same one in every process.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
        # Also for the compiler, which then tries nothing out. What has no such kernel warns.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # TF32 for the products that stay in float32 on a GPU: those of the loss, and with --precision
    # fp32 all. Its 10 bits of mantissa are as many as the released code's float16 has.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def prepare(model: torch.nn.Module, runtime: Runtime) -> None:
    """Move a model to its device in channels-last memory."""
    model.to(runtime.device).to(memory_format=torch.channels_last)


OUT_OF_MEMORY = "not enough memory; choose a smaller --batch-size, --size or --projector"


def is_out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def synchronise(device: torch.device) -> None:
    """Wait for the device, for the sake of a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
