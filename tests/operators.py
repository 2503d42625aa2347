"""The operators that run inside a `with` block, for tests of what is launched and moved."""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Call(NamedTuple):
    name: str  # such as "aten::add"
    arguments: tuple
    results: object

    @property
    def num_bytes(self) -> int:
        """Of arguments and results."""
        return sum(t.nbytes for t in tensors_of((self.arguments, self.results)))


class Operators(TorchDispatchMode):
    """Records calls of the operators whose names begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        if function._schema.name.startswith(self.prefix):
            name = function._schema.name.removeprefix(self.prefix)
            self.calls.append(Call(name, arguments, results))
        return results
