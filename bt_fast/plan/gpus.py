"""GPUs by their published figures: memory, its bandwidth, and the rate of dense bf16 products."""

from dataclasses import dataclass, replace

MEMORY_SHARE = 0.95  # of a GPU's memory; the rest is lost between the allocator's blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A model of GPU."""

    name: str
    memory: float  # bytes that a run may take
    bytes_per_s: float = 0.0  # 0: not known, and so the other rate
    flop_per_s: float = 0.0  # bf16 on tensor cores, accumulated in float32, without sparsity


# Rates of NVIDIA's data sheets and white papers; memory as MEMORY_SHARE of what torch shows: of
# 24 GB 23.7e9 bytes on an L4 or A10 (25.3e9 on an RTX), of 40 GB 42.3e9, of 80 GB 85e9.
CARDS = (
    Card(name="RTX 3090", memory=22.5e9, bytes_per_s=936e9, flop_per_s=71e12),
    Card(name="RTX 4090", memory=22.5e9, bytes_per_s=1008e9, flop_per_s=165e12),
    Card(name="L4", memory=22.5e9, bytes_per_s=300e9, flop_per_s=121e12),
    Card(name="A10", memory=22.5e9, bytes_per_s=600e9, flop_per_s=125e12),
    Card(name="A100 40 GB", memory=40e9, bytes_per_s=1555e9, flop_per_s=312e12),
    Card(name="A100 80 GB", memory=80e9, bytes_per_s=2039e9, flop_per_s=312e12),
    Card(name="H100 PCIe", memory=80e9, bytes_per_s=2000e9, flop_per_s=756e12),
    Card(name="H100", memory=80e9, bytes_per_s=3350e9, flop_per_s=989e12),
    Card(name="H200", memory=141e9, bytes_per_s=4800e9, flop_per_s=989e12),
)
CLASSES = {"GPUs of 24 GB": CARDS[:4], "GPUs of 40 GB": CARDS[4:5], "GPUs of 80 GB": CARDS[5:8]}
H100, H200 = CARDS[-2:]


def of_device(name: str, total_memory: int) -> Card:
    """The card behind torch's name of a device, with its own memory; without rates if unknown."""
    words = {"40", "80", "GB", *name.replace("-", " ").split()}
    if words & {"D", "Ti", "SUPER", "Laptop", "Mobile"}:  # another GPU than that of the same number
        words = set()
    known = [
        card
        for card in CARDS  # by their memory too: neither a laptop's nor a part of a card
        if words.issuperset(card.name.split()) and 0.85 < total_memory / card.memory < 1.2
    ]
    found = max(known, key=lambda card: len(card.name), default=Card(name="", memory=0))
    return replace(found, name=name.removeprefix("NVIDIA "), memory=MEMORY_SHARE * total_memory)


def present() -> Card | None:
    """This machine's first GPU, None where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return of_device(properties.name, properties.total_memory)
