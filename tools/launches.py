"""Kernel launches of one LARS step for ResNet-50 and its projector: plain loop, foreach, fused.

    python tools/launches.py

Needs no GPU. (On one, the fused update also copies two tables of a few kB from the host.) Every
operation that torch dispatches and that computes something would be at least one launch there;
views and allocations are none. Triton's kernels run in its interpreter. The tensors are small here,
because launches depend on their number and not on their sizes.
"""

import _checkout  # noqa: F401  # isort: skip

import os
from collections import Counter

os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bt_fast import lars_triton
from bt_fast.lars import LARS, parameter_groups
from bt_fast.model import BarlowTwins
from tools import reference

KERNELS = ("_sums", "_ratios", "_apply")
_NOT_LAUNCHED = {"empty", "empty_like", "_to_copy", "detach", "unbind", "zeros_like"}


class Operations(TorchDispatchMode):
    """Counts what would be launched on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NOT_LAUNCHED and not name.startswith("_record"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class _Counted:
    """A Triton kernel that notes its launches."""

    def __init__(self, kernel, name: str, names: Counter) -> None:
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names[self.name] += 1
            with _disable_current_modes():  # what the interpreter itself does does not count
                return self.kernel[grid](*args, **kwargs)

        return launch


def launches(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """What one step launches, once the first has made what the others use again."""
    optimizer.step()
    operations = Operations()
    kernels = {name: getattr(lars_triton, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(lars_triton, name, _Counted(kernel, name, operations.names))
        with operations:
            optimizer.step()
    finally:
        for name, kernel in kernels.items():
            setattr(lars_triton, name, kernel)
    return operations.names


def main() -> None:
    with torch.device("meta"):
        model = BarlowTwins("resnet50", (8192, 8192, 8192))
    shapes = [tuple(min(side, 4) for side in p.shape) for p in model.parameters()]
    parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
    for p in parameters:
        p.grad = torch.ones_like(p)

    print(f"one LARS step, ResNet-50 + projector of three layers, {len(parameters)} tensors")
    contenders = {
        "plain loop": reference.Lars(parameter_groups(parameters), 0.1, weight_decay=1e-6),
        "foreach (definition)": LARS(
            parameter_groups(parameters), 0.1, weight_decay=1e-6, fused=False
        ),
        "fused (on a GPU)": LARS(parameter_groups(parameters), 0.1, weight_decay=1e-6, fused=True),
    }
    for name, optimizer in contenders.items():
        counts = launches(optimizer)
        listed = ", ".join(f"{count} {what}" for what, count in counts.most_common(12))
        print(f"{name:>20}: {counts.total():5} ({listed})")


if __name__ == "__main__":
    main()
