"""Bytes and kernels of a compiled training step on an H100, counted without one.

    python tools/compiled_traffic.py --blocks 1 1 1 1 [--images 256] [--ranks 8] [--norm fused]

Inductor lowers forward and backward pass of encoder and projector (no loss, augmentation and
optimizer) to generated code on fake tensors; nothing is compiled or run. Dynamo sees CUDA tensors,
so that code which tests for them takes its GPU path. Autograd needs a real context for CUDA
tensors, so that the graph is differentiated on the CPU and then moved. The numbers are valid for
the installed version of torch, whose internals this uses. ResNet-50, the default, takes minutes.

In a kernel that Inductor generates, a tensor counts once for each loop that reads it and once for
each that writes it; an atomic addition does both. All loads of one tensor in one loop, such as the
nine of a max-pool's window, count their elements together, at most the complete tensor. A slice
counts the elements that are read, a gather or scatter one element per address. Other kernels
(custom ones, convolutions and matrix products of libraries) count every tensor argument and result
once, collectives only the input of a rank.
"""

import _checkout  # noqa: F401  # isort: skip

import contextlib
import math
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import triton
from torch import nn

# private interfaces of torch 2.11 and 2.14
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, ir
from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

from bt_fast.cli import run_command
from bt_fast.config import Config
from bt_fast.models import batch_norm
from bt_fast.models import networks as models
from pipelines.common.flags import parse_flags

_TORCH = {"aten", "prims", "prim", "inductor", "_c10d_functional"}  # other operators are custom
_H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    is_integrated=0, gcnArchName="",
)  # fmt: skip


class _Lowered(BaseException):
    """Both passes are lowered and nothing must be compiled. torch would wrap an Exception."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    name: str
    category: str  # "fused" by Inductor, "custom", "library" or "collective"
    backward: bool
    bytes: int


@dataclass(kw_only=True, slots=True)
class Traffic:
    kernels: list[Kernel] = field(default_factory=list)
    saved: int = 0  # bytes kept for the backward pass

    def of(self, *names: str, backward: bool | None = None) -> list[Kernel]:
        """Kernels of these categories, of one pass or both."""
        return [k for k in self.kernels if k.category in names and backward in (None, k.backward)]

    def gigabytes(self, *names: str, backward: bool | None = None) -> float:
        return sum(kernel.bytes for kernel in self.of(*names, backward=backward)) / 1e9


@dataclass(frozen=True, kw_only=True)
class Options:
    """Bytes and kernels of a compiled training step on an H100, counted without one."""

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottlenecks per stage; 1 1 1 1 is quick."""
    images: int = 256
    """Number of images per rank and step, with two views each."""
    size: int = 224
    """Side of a view, pixels."""
    ranks: int = 1
    """Number of ranks with common batch statistics."""
    norm: Literal["compiled", "fused"] = "compiled"
    """Implementation of batch norm, as --norm of pretrain."""

    def __post_init__(self) -> None:
        if min(*self.blocks, self.images - 1, self.size // 32, self.ranks) < 1:
            raise ValueError("--blocks and --ranks at least 1, --images 2, --size 32")


def main() -> int:
    options = parse_flags(Options, "compiled_traffic.py", None)
    model = build(options.blocks)
    if batch_norm.choose_norm(options.norm, torch.device("cuda")) == "fused":
        batch_norm.fuse(model)
    shape = (2 * options.images, 3, options.size, options.size)
    traffic = measure(model, shape, num_ranks=options.ranks)
    print(f"{'GB':30}  number  < 1 MB  forward backward     both")
    for title, names in {
        "fused and custom kernels": ("fused", "custom"),
        "  custom kernels": ("custom",),
        "convolutions, matrix products": ("library",),
        "collectives": ("collective",),
    }.items():
        kernels = traffic.of(*names)
        small = sum(kernel.bytes < 1e6 for kernel in kernels)
        passes = [traffic.gigabytes(*names, backward=backward) for backward in (False, True, None)]
        figures = " ".join(f"{figure:8.3f}" for figure in passes)
        print(f"{title:30} {len(kernels):7} {small:7} {figures}")
    print(f"saved for the backward pass: {traffic.saved / 1e9:.2f} GB; the largest kernels:")
    for kernel in sorted(traffic.of("fused", "custom"), key=lambda kernel: -kernel.bytes)[:20]:
        direction = "backward" if kernel.backward else "forward"
        print(f"{kernel.bytes / 1e6:6.0f} MB {direction} {kernel.name}")
    return 0


def build(blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """Encoder of these bottlenecks per stage and the paper's projector on the meta device."""
    with torch.device("meta"):
        model = models.BarlowTwins(Config())
        model.encoder = models.ResNet(
            models.Bottleneck, list(blocks), norm_layer=batch_norm.BatchNorm2d
        )
        model.encoder.fc = nn.Identity()
    return model


def measure(model: nn.Module, shape: tuple[int, ...], *, num_ranks: int = 1) -> Traffic:
    """Lower one training step of a model on the meta device under bf16 autocast.

    Call it once per process, whose autocast it enables and whose properties of devices it changes.

    Args:
        shape: shape of the input, [2 n, ...]; channels-last if it has four dimensions.
        num_ranks: number of ranks with common batch statistics.
    """
    traffic = Traffic()

    def backend(graph_module, inputs):
        _move(graph_module, "cuda", "cpu")
        with fake_mode:
            inputs = [like(i, "cpu") if isinstance(i, torch.Tensor) else i for i in inputs]
        return aot_module_simplified(
            graph_module,
            inputs,
            fw_compiler=lambda graph_module, inputs: graph_module,
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )

    def partition(joint, joint_inputs, **keywords):
        _lower_step(joint, joint_inputs, keywords, traffic)
        raise _Lowered

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with group_of(num_ranks) as group, _h100(traffic):
        batch_norm.set_process_group(model, group)
        for device in ("cuda", "cpu"):  # torch.autocast("cuda") disables itself without a GPU
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
        with fake_mode:
            to_fake(model.train(), "cuda")
            views = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            views = views.to(memory_format=torch.channels_last) if len(shape) == 4 else views
            if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
                batch_norm.RunningStatistics(model)
            with contextlib.suppress(_Lowered):
                torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(views)
    return traffic


def _lower_step(joint, joint_inputs, keywords, traffic: Traffic) -> None:
    """Lower a joint graph as Inductor does, up to the generated code of both passes."""
    joint = compile_fx._recursive_joint_graph_passes(joint)  # computes and folds constants
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    fake_mode = placeholders[0].meta["val"].fake_mode
    _move(joint, "cpu", "cuda")
    with fake_mode:
        inputs = [like(n.meta["val"], "cuda") for n in placeholders]
    FakeTensorProp(joint, fake_mode).propagate_dont_convert_inputs(*inputs)
    passes = min_cut_rematerialization_partition(
        joint, joint_inputs, compiler="inductor", **keywords
    )
    for backward, graph_module in enumerate(passes):
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        inputs = [n.meta["val"] for n in placeholders]
        if backward:
            kept = [n for n in placeholders if not n.name.startswith(("primals", "tangents"))]
            traffic.saved = sum(n.meta["val"].nbytes for n in kept)
        with V.set_fake_mode(fake_mode), tracing(TracingContext(fake_mode)), DebugContext():
            compile_fx.view_to_reshape(graph_module)
            compile_fx.fake_tensor_prop(graph_module, inputs)
            compile_fx._recursive_post_grad_passes(graph_module, is_inference=False)
            graph = GraphLowering(
                graph_module, example_inputs=inputs, is_backward=bool(backward), graph_id=0
            )
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph.codegen()
                _count_calls(graph, traffic)


def _move(graph_module, source: str, target: str) -> None:
    """Replace the device in all arguments of a graph and of its subgraphs."""

    def renamed(value):
        is_device = isinstance(value, torch.device) and value.type == source
        return torch.device(target) if is_device else target if value == source else value

    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.args = torch.fx.node.map_aggregate(node.args, renamed)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, renamed)
            module.recompile()


def like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """An empty tensor of the same shape, strides and dtype on a device."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return new.requires_grad_(tensor.requires_grad)


def to_fake(model: nn.Module, device: str) -> None:
    """Give a model on the meta device channels-last tensors of the active FakeTensorMode."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return new.to(memory_format=torch.channels_last) if tensor.ndim == 4 else new

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def group_of(num_ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group whose collectives have no effect; None for one rank."""
    if num_ranks == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _h100(traffic: Traffic) -> Iterator[None]:
    """Make Inductor target an H100 and record the accesses of its kernels."""

    def convolution_format(x, weight, backend):  # as cuDNN selects it
        formats = (torch._prims_common.suggest_memory_format(t) for t in (x, weight))
        return max(formats, key=lambda f: f == torch.channels_last)

    patches: list[tuple] = [
        (torch.cuda, "get_device_properties", lambda device=None: _H100),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch._C, "_conv_determine_backend_memory_format", convolution_format),
        (TritonKernel, "load", _recording(TritonKernel.load, "read")),
        (TritonKernel, "store", _recording(TritonKernel.store, "write")),
        (TritonKernel, "store_reduction", _recording(TritonKernel.store_reduction, "write")),
        (TritonKernel, "codegen_body", _next_loop(TritonKernel.codegen_body)),
        (TritonScheduling, "define_kernel", _counting(TritonScheduling.define_kernel, traffic)),
    ]
    for owner, name, value in (
        (CudaInterface.Worker, "get_device_properties", _H100),
        (CudaInterface, "get_device_properties", _H100),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "is_triton_capable", True),
        (CudaInterface, "raise_if_triton_unavailable", None),
        (CudaInterface, "is_available", True),
    ):
        patches.append((owner, name, staticmethod(lambda device=None, value=value: value)))
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with contextlib.ExitStack() as stack:
        for owner, name, new in [*patches, (triton.runtime.driver, "_active", driver)]:
            stack.enter_context(mock.patch.object(owner, name, new))
        DeviceProperties.create.cache_clear()
        yield


def _recording(method, direction: str):
    """Wraps TritonKernel.load and others to record the number of elements by loop, direction,
    buffer and index: repeated calls with the same key are one access of the kernel."""

    def wrapped(kernel, name, index, *arguments, **keywords):
        entries = [kernel.range_tree_nodes.get(symbol) for symbol in index.free_symbols]
        known = [entry for entry in entries if entry is not None]
        num_elements = math.prod(int(entry.length) for entry in known)
        if len(known) < len(entries):  # a computed address: one element per element of the kernel
            num_elements = math.prod(int(tree.numel) for tree in kernel.range_trees)
        in_loop = any(entry.root.is_loop for entry in known)
        loop = vars(kernel).get("loop", 0) if in_loop else -1
        recorded = vars(kernel).setdefault("recorded", defaultdict(dict))
        is_atomic = "atomic_add" in (*arguments, *keywords.values())
        for each in ("read", "write") if is_atomic else (direction,):
            recorded[loop, each, name][index] = num_elements
        return method(kernel, name, index, *arguments, **keywords)

    return wrapped


def _next_loop(method):
    """Wraps TritonKernel.codegen_body, which ends a loop."""

    def wrapped(kernel):
        kernel.loop = vars(kernel).get("loop", 0) + 1
        return method(kernel)

    return wrapped


def _counting(method, traffic: Traffic):
    """Wraps TritonScheduling.define_kernel, called once per call of a kernel, to count bytes."""

    def wrapped(scheduling, source, nodes, kernel):
        name = method(scheduling, source, nodes, kernel)
        num_bytes = 0
        for part in getattr(kernel, "sub_kernels", [kernel]):
            dead = V.graph.removed_buffers | part.removed_buffers
            dead |= V.graph.inplaced_to_remove | part.inplaced_to_remove
            for (_, _, buffer), counts in vars(part).get("recorded", {}).items():
                if buffer not in dead:
                    numel = min(sum(counts.values()), int(V.graph.get_numel(buffer)))
                    num_bytes += numel * V.graph.get_dtype(buffer).itemsize
        traffic.kernels.append(
            Kernel(name=name, category="fused", backward=V.graph.is_backward, bytes=num_bytes)
        )
        return name

    return wrapped


def _count_calls(graph, traffic: Traffic) -> None:
    """Count the calls of a lowered graph that are not kernels generated by Inductor."""
    calls = [part.node for node in graph.scheduler.nodes for part in node.get_nodes()]
    calls = [call for call in calls if isinstance(call, ir.ExternKernel)]
    results = defaultdict(int)
    for call in calls:
        if isinstance(call, ir.MultiOutput):
            results[call.inputs[0].get_name()] += _bytes_of(call)
    for call in calls:
        if isinstance(call, (ir.MultiOutput, ir._WaitKernel)):
            continue
        operator = getattr(call, "op_overload", None)
        if isinstance(call, ir._CollectiveKernel):
            group = "collective"
        elif isinstance(call, ir.UserDefinedTritonKernel) or (
            operator is not None and operator.namespace not in _TORCH
        ):
            group = "custom"
        else:
            group = "library"
        inputs = [value for value in tree_leaves(call.inputs) if isinstance(value, ir.IRNode)]
        size = sum(map(_bytes_of, inputs))
        if group != "collective":
            size += _bytes_of(call) + results[call.name]
        if isinstance(call, ir.UserDefinedTritonKernel):
            name = call.get_kernel_and_metadata()[0].__name__
        else:
            name = str(operator or call.python_kernel_name or type(call).__name__)
        traffic.kernels.append(
            Kernel(name=name, category=group, backward=graph.is_backward, bytes=size)
        )


def _bytes_of(node) -> int:
    if not node.has_tensor_output():
        return 0
    return math.prod(int(side) for side in node.get_size()) * node.get_dtype().itemsize


if __name__ == "__main__":
    sys.exit(run_command("compiled_traffic.py", main))
