"""Lowers a training step for an H100 without a GPU and counts the bytes that its kernels move.

Inductor lowers forward and backward pass to generated code on fake tensors; nothing is compiled or
run. Dynamo sees CUDA tensors, so that code which tests for them takes its GPU path. Autograd needs
a real context for CUDA tensors, so that the graph is differentiated on the CPU and then moved.

Bytes of each kernel that Inductor generates:

- accesses: a tensor counts once for each loop of the kernel that reads it and once for each that
  writes it, so that a second pass over the input of a reduction counts again. An atomic addition
  counts as a read and a write. All loads of one tensor in one loop, such as the nine of a
  max-pool's window, count their elements together, at most the complete tensor: caches serve the
  excess. A slice counts the elements that are read, a broadcast vector its size, a gather or
  scatter one element per address.
- once: the sizes of the kernel's arguments; those updated in place count twice.

Custom kernels (Triton kernels behind `torch.library.wrap_triton`, and operators outside of torch's
namespaces) count every tensor argument and result once, because the number of reads is not known.
The same holds for library calls (convolutions, matrix products) and for collectives, which count
only the input of a rank.

The step does not include loss, augmentation and optimizer. Call `measure` in a new process, because
torch caches properties of devices per process.
"""

import contextlib
import inspect
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from bt_fast.models import batch_norm
from bt_fast.models import networks as models

try:  # private interfaces of torch
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, ir
    from torch._inductor.codegen.common import TensorArg
    from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from triton.backends.compiler import GPUTarget

    _missing = None
except ImportError as error:
    _missing = error

TESTED = ("2.11.", "2.14.")  # versions of torch with compatible internals
_TORCH = {"aten", "prims", "prim", "inductor", "_c10d_functional"}  # other operators are custom
_H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    is_integrated=0,
    gcnArchName="",
)


class Unsupported(Exception):
    """The internals of this version of torch are not compatible; the message gives the reason."""


class _Lowered(BaseException):
    """Both passes are lowered and nothing must be compiled. torch would wrap an Exception."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    name: str
    category: str  # "fused" by Inductor, "custom", "library" or "collective"
    backward: bool
    accesses: int  # bytes, every access counted
    once: int  # bytes, every argument counted once


@dataclass(kw_only=True, slots=True)
class Traffic:
    kernels: list[Kernel] = field(default_factory=list)
    saved: int = 0  # bytes kept for the backward pass

    def of(self, *names: str, backward: bool | None = None) -> list[Kernel]:
        """Kernels of these categories, of one pass or both; by default fused and custom."""
        names = names or ("fused", "custom")
        return [k for k in self.kernels if k.category in names and backward in (None, k.backward)]

    def gigabytes(self, *names: str, once: bool = False, backward: bool | None = None) -> float:
        """GB that these kernels move, by accesses or with every argument counted once."""
        kernels = self.of(*names, backward=backward)
        return sum(k.once if once else k.accesses for k in kernels) / 1e9


def build(encoder: str = "resnet50", blocks: tuple[int, ...] | None = None) -> nn.Module:
    """Encoder and the paper's projector on the meta device; blocks: bottlenecks per stage."""
    with torch.device("meta"):
        model = models.BarlowTwins("resnet50" if blocks else encoder, (8192, 8192, 8192))
        if blocks:
            model.encoder = models.ResNet(
                models.Bottleneck, list(blocks), norm_layer=batch_norm.BatchNorm2d
            )
            model.encoder.fc = nn.Identity()
    return model


def measure(
    model: nn.Module, shape: tuple[int, ...], *, num_ranks: int = 1, out: Path | None = None
) -> Traffic:
    """Lower one training step of a model on the meta device under bf16 autocast.

    Args:
        shape: shape of the input, [2 n, ...]; channels-last if it has four dimensions.
        num_ranks: number of ranks with common batch statistics.
        out: folder for the generated code.

    Raises Unsupported if torch's internals differ and the version is not in TESTED.
    """
    if _missing is not None:
        raise Unsupported(f"torch {torch.__version__}: {_missing}")
    traffic = Traffic()

    def backend(graph_module, inputs):
        _move(graph_module, "cuda", "cpu")
        with fake_mode:
            inputs = [_like(i, "cpu") if isinstance(i, torch.Tensor) else i for i in inputs]
        with _errors_of_internals():  # an error of the model is raised by the call below
            inspect.signature(aot_module_simplified).bind(graph_module, inputs, **compilers)
        return aot_module_simplified(graph_module, inputs, **compilers)

    def partition(joint, joint_inputs, **keywords):
        with _errors_of_internals():
            _lower_step(joint, joint_inputs, keywords, traffic, out)
        raise _Lowered

    compilers = {
        "fw_compiler": lambda graph_module, inputs: graph_module,
        "partition_fn": partition,
        "decompositions": select_decomp_table(),
        "keep_inference_input_mutations": True,
    }
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(group_of(num_ranks))
        with _errors_of_internals():
            stack.enter_context(_h100(traffic))
        batch_norm.set_process_group(model, group)
        views = _place(model.train(), shape, fake_mode)
        stack.enter_context(_bf16())
        stack.enter_context(fake_mode)
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
            batch_norm.RunningStatistics(model)
        try:
            torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(views)
        except _Lowered:
            return traffic
        except torch._dynamo.exc.BackendCompilerFailed as failed:
            is_unsupported = isinstance(failed.inner_exception, Unsupported)
            raise failed.inner_exception if is_unsupported else failed from None
    raise AssertionError("the model has no backward pass")


@contextlib.contextmanager
def _errors_of_internals() -> Iterator[None]:
    """Converts errors to Unsupported, around calls of torch's internals only. In TESTED versions,
    errors are raised unchanged, because their cause is this module or the model."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        if torch.__version__.startswith(TESTED):
            raise
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"torch {torch.__version__}: {type(error).__name__}: {reason}") from error


def _lower_step(joint, joint_inputs, keywords, traffic: Traffic, out: Path | None) -> None:
    """Lower a joint graph as Inductor does, up to the generated code of both passes."""
    joint = compile_fx._recursive_joint_graph_passes(joint)  # computes and folds constants
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    fake_mode = placeholders[0].meta["val"].fake_mode
    _move(joint, "cpu", "cuda")
    with fake_mode:
        inputs = [_like(n.meta["val"], "cuda") for n in placeholders]
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
                code = graph.codegen()[0].value
                _count_calls(graph, traffic)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / ("backward.py" if backward else "forward.py")).write_text(code)


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


def _like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """An empty tensor of the same shape, strides and dtype on a device."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return new.requires_grad_(tensor.requires_grad)


def _place(model: nn.Module, shape: tuple[int, ...], fake_mode) -> torch.Tensor:
    """Move a model to a fake GPU, channels-last; returns an input for it."""
    model.to(memory_format=torch.channels_last)
    with fake_mode:
        replace_tensors(model, lambda tensor: _like(tensor.detach(), "cuda"))
        views = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return views.to(memory_format=torch.channels_last) if len(shape) == 4 else views


def replace_tensors(model: nn.Module, like: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each parameter and buffer of a model by the result of `like`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(like(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = like(buffer)


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
def _bf16() -> Iterator[None]:
    """Autocast on both devices; torch.autocast("cuda") disables itself without a GPU."""
    devices = ("cuda", "cpu")
    before = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    try:
        for device in devices:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
        yield
    finally:
        for device, (enabled, dtype) in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@contextlib.contextmanager
def _h100(traffic: Traffic) -> Iterator[None]:
    """Make Inductor target an H100 and record the accesses of its kernels."""

    def convolution_format(x, weight, backend):  # as cuDNN selects it
        formats = (torch._prims_common.suggest_memory_format(t) for t in (x, weight))
        return max(formats, key=lambda f: f == torch.channels_last)

    patches = [
        (CudaInterface.Worker, "get_device_properties", lambda device=None: _H100),
        (CudaInterface, "get_device_properties", lambda device=None: _H100),
        (CudaInterface, "get_compute_capability", lambda device=None: 90),
        (CudaInterface, "is_triton_capable", lambda device=None: True),
        (CudaInterface, "raise_if_triton_unavailable", lambda device=None: None),
        (CudaInterface, "is_available", lambda: True),
        (torch.cuda, "get_device_properties", lambda device=None: _H100),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch._C, "_conv_determine_backend_memory_format", convolution_format),
        (TritonKernel, "load", _recording(TritonKernel.load, ("read",))),
        (TritonKernel, "store", _recording(TritonKernel.store, ("write",))),
        (TritonKernel, "store_reduction", _recording(TritonKernel.store_reduction, ("write",))),
        (TritonKernel, "codegen_body", _next_loop(TritonKernel.codegen_body)),
        (TritonScheduling, "define_kernel", _counting(TritonScheduling.define_kernel, traffic)),
    ]
    target = GPUTarget("cuda", 90, 32)
    driver = types.SimpleNamespace(get_current_target=lambda: target)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            is_interface = owner in (CudaInterface, CudaInterface.Worker)
            new = staticmethod(replacement) if is_interface else replacement
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        yield


def _recording(method, directions: tuple[str, ...]):
    """Wraps TritonKernel.load, .store or .store_reduction to record the number of elements by loop,
    direction, buffer and index: repeated calls with the same key are one access of the kernel."""

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
        for direction in ("read", "write") if is_atomic else directions:
            recorded[loop, direction, name][index] = num_elements
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
        accesses = once = 0
        for part in getattr(kernel, "sub_kernels", [kernel]):
            dead = V.graph.removed_buffers | part.removed_buffers
            dead |= V.graph.inplaced_to_remove | part.inplaced_to_remove
            for (_, _, buffer), counts in vars(part).get("recorded", {}).items():
                if buffer not in dead:
                    numel = min(sum(counts.values()), int(V.graph.get_numel(buffer)))
                    accesses += numel * V.graph.get_dtype(buffer).itemsize
            for argument in part.args.python_argdefs()[2]:
                if isinstance(argument, TensorArg):
                    times = 2 if argument.name.startswith("in_out") else 1
                    numel = int(V.graph.get_numel(argument.buffer))
                    once += times * numel * argument.dtype.itemsize
        backward = V.graph.is_backward
        traffic.kernels.append(
            Kernel(name=name, category="fused", backward=backward, accesses=accesses, once=once)
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
        size = sum(map(_bytes_of, _tensors_of(call.inputs)))
        if group != "collective":
            size += _bytes_of(call) + results[call.name]
        if isinstance(call, ir.UserDefinedTritonKernel):
            name = call.get_kernel_and_metadata()[0].__name__
        else:
            name = str(operator or call.python_kernel_name or type(call).__name__)
        traffic.kernels.append(
            Kernel(name=name, category=group, backward=graph.is_backward, accesses=size, once=size)
        )


def _tensors_of(inputs) -> Iterator:
    for value in inputs:
        if isinstance(value, (list, tuple)):
            yield from _tensors_of(value)
        elif isinstance(value, ir.IRNode):
            yield value


def _bytes_of(node) -> int:
    if not node.has_tensor_output():
        return 0
    return math.prod(int(side) for side in node.get_size()) * node.get_dtype().itemsize
