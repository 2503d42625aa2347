"""GPUs by their published figures: memory, its bandwidth, and the rate of dense bf16 products."""

from dataclasses import dataclass, replace

MEMORY_FRACTION = 0.95  # of a GPU's memory; the rest is lost to fragmentation in the allocator


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuModel:
    """A model of GPU."""

    name: str
    memory: float  # bytes that a run may use
    bytes_per_s: float = 0.0  # 0: unknown, and flop_per_s too
    flop_per_s: float = 0.0  # bf16 on tensor cores, accumulated in float32, without sparsity


# Rates of NVIDIA's data sheets and white papers; memory as MEMORY_FRACTION of torch's figure: of
# 24 GB 23.7e9 bytes on an L4 or A10 (25.3e9 on an RTX), of 40 GB 42.3e9, of 80 GB 85e9.
MODELS = (
    GpuModel(name="RTX 3090", memory=22.5e9, bytes_per_s=936e9, flop_per_s=71e12),
    GpuModel(name="RTX 4090", memory=22.5e9, bytes_per_s=1008e9, flop_per_s=165e12),
    GpuModel(name="L4", memory=22.5e9, bytes_per_s=300e9, flop_per_s=121e12),
    GpuModel(name="A10", memory=22.5e9, bytes_per_s=600e9, flop_per_s=125e12),
    GpuModel(name="A100 40 GB", memory=40e9, bytes_per_s=1555e9, flop_per_s=312e12),
    GpuModel(name="A100 80 GB", memory=80e9, bytes_per_s=2039e9, flop_per_s=312e12),
    GpuModel(name="H100 PCIe", memory=80e9, bytes_per_s=2000e9, flop_per_s=756e12),
    GpuModel(name="H100", memory=80e9, bytes_per_s=3350e9, flop_per_s=989e12),
    GpuModel(name="H200", memory=141e9, bytes_per_s=4800e9, flop_per_s=989e12),
)
BY_MEMORY = {
    "GPUs of 24 GB": MODELS[:4],
    "GPUs of 40 GB": MODELS[4:5],
    "GPUs of 80 GB": MODELS[5:8],
}
H100, H200 = MODELS[-2:]


def of_device(name: str, total_memory: int) -> GpuModel:
    """The model for torch's name of a device, with its actual memory; without rates if unknown."""
    words = {"40", "80", "GB", *name.replace("-", " ").split()}
    if words & {"D", "Ti", "SUPER", "Laptop", "Mobile"}:  # another GPU with the same number
        words = set()
    candidates = [
        gpu
        for gpu in MODELS  # the memory excludes laptop GPUs and MIG instances
        if words.issuperset(gpu.name.split()) and 0.85 < total_memory / gpu.memory < 1.2
    ]
    memory, unknown = MEMORY_FRACTION * total_memory, GpuModel(name="", memory=0)
    model = max(candidates, key=lambda gpu: len(gpu.name), default=unknown)
    return replace(model, name=name.removeprefix("NVIDIA "), memory=memory)


def first_gpu() -> GpuModel | None:
    """This machine's first GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return of_device(properties.name, properties.total_memory)
