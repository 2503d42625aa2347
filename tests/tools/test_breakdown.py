"""A step by class of work: kernels, streams and traces; what is counted."""

import pytest
import torch

from bt_fast.config import Config
from bt_fast.models.networks import BarlowTwins
from tools.breakdown import (
    AUGMENT,
    CLASSES,
    Activity,
    activities,
    breakdown,
    busy,
    classify,
    count_work,
)
from tools.timing import Ceilings

BACKWARD = "autograd::engine::evaluate_function: ConvolutionBackward0"
COMPILED = "## Call CompiledFxGraph f"  # on a CPU
KERNELS = {
    "convolutions": [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128", ()),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_relu>", ()),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", ()),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", ("aten::cudnn_convolution",)),
        ("cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16", (BACKWARD,)),
        ("triton_tem_fused_convolution_12", ()),
        ("aten::empty", ("aten::conv2d", "aten::mkldnn_convolution")),
    ],
    "norm": [
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1>", ()),
        ("triton_red_fused__to_copy_add_mul_sum_threshold_backward_7", ()),
        ("triton_poi_fused_convolution_backward_add_relu_4", (COMPILED,)),
        ("_norm_statistics", ()),
        ("vectorized_elementwise_kernel<4, launch_clamp_scalar>", ("aten::relu_",)),
        ("at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16>", ()),
        ("aten::sum", ("_NormaliseBackward",)),
        (COMPILED, ("Torch-Compiled Region: 0/0",)),
    ],
    "products": [
        ("nvjet_hsh_192x192_64x3_2x1_v_bz_NNT", ("aten::mm",)),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", ()),
        ("aten::addmm", ("aten::linear",)),
    ],
    "optimizer": [
        ("_apply", ()),
        ("multi_tensor_apply_kernel<AddFunctor>", ("Optimizer.step#LARS.step",)),
    ],
    "augmentation": [("_contrast_sums", (AUGMENT,)), ("_augment", ()), (AUGMENT, ())],
    "communication": [
        ("ncclDevKernel_AllReduce_Sum_f64_RING_LL(ncclDevKernelArgsStorage<4096ul>)", (BACKWARD,)),
        ("aten::view", ("gloo:all_gather",)),
    ],
    "other": [
        ("Memcpy HtoD (Pinned -> Device)", (AUGMENT,)),
        ("triton_poi_fused__to_copy_3", (COMPILED,)),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", ("aten::copy_",)),
        ("something_new", (COMPILED,)),
    ],
}


def test_kernels_of_each_class():
    assert [*KERNELS, "gaps"] == list(CLASSES)
    for expected, kernels in KERNELS.items():
        for kernel in kernels:
            assert classify(*kernel) == expected, kernel


def kernel(name: str, start: float, end: float, *ranges: str) -> Activity:
    return Activity(name=name, start=start, end=end, ranges=ranges)


CONVOLUTION, COLLECTIVE = "sm90_xmma_fprop", "ncclDevKernel_AllReduce"


def test_gaps_and_exposed_communication_of_streams_that_overlap():
    """Two steps: |0 convolution 10|, |4 collective 14|, |12 copy 16|, |20 convolution 23|."""
    work = [
        kernel("Memcpy HtoD", 12, 16),
        kernel(COLLECTIVE, 4, 14),
        kernel(CONVOLUTION, 20, 23),
        kernel(CONVOLUTION, 0, 10),
        kernel(CONVOLUTION, 2, 5),  # on another stream
    ]
    assert busy(work) == 19
    found = breakdown(work, 2, 12, {"convolutions": 8.0}, {})
    assert list(found.parts) == ["convolutions", "communication", "other", "gaps"]
    figures = {n: (part.seconds, part.alone, part.launches) for n, part in found.parts.items()}
    assert figures == {
        "convolutions": (6.5, 3.5, 1.5),
        "communication": (5, 1, 0.5),  # alone from 10 to 12
        "other": (2, 1, 0.5),
        "gaps": (2.5, 2.5, 0),
    }
    ceilings = Ceilings(flops=2.0, memory=1.0, link=1.0)
    reached = {name: part.reached(ceilings) for name, part in found.parts.items()}
    assert reached == {"convolutions": 8 / 6.5 / 2, "communication": 0, "other": 0, "gaps": 0}
    longest = found.kernels["longest"]
    assert longest[0] == {"name": CONVOLUTION, "ms": 8000, "launches": 1.5, "share": 16 / 30}
    assert breakdown(work, 2, 9, {}, {}).parts["gaps"].seconds == 0


def event(kind: str, name: str, start: float, length: float, thread: int = 1, **arguments) -> dict:
    """As in a Chrome trace, times in microseconds."""
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": thread,
            "args": arguments}  # fmt: skip


def test_kernels_of_a_trace_know_what_launched_them():
    trace = [
        {"ph": "M", "name": "thread_name", "tid": 1},
        event("user_annotation", "Optimizer.step#LARS.step", 50, 20),
        event("cpu_op", "aten::conv2d", 0, 40),
        event("cpu_op", "aten::cudnn_convolution", 5, 20),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=3),
        event("cuda_driver", "cuLaunchKernelEx", 55, 3, correlation=4),
        event("cuda_runtime", "cudaMemcpyAsync", 45, 3, correlation=5),  # within nothing
        event("cpu_op", BACKWARD, 0, 100, 2),  # another thread, at the same time
        event("cuda_runtime", "cudaLaunchKernel", 60, 1, 2, correlation=6),
        event("kernel", "nvjet_hsh", 100, 50, 7, correlation=3),
        event("kernel", "_some_kernel", 200, 10, 7, correlation=4),
        event("gpu_memcpy", "Memcpy DtoD", 160, 5, 7, correlation=5),
        event("kernel", "cutlass_80_gemm", 150, 10, 9, correlation=6),
        event("kernel", "_norm_sums", 300, 10, 7, correlation=99),  # its launch is not there
    ]
    found = {a.name: (a.start, a.end, a.ranges) for a in activities(trace, on_gpu=True)}
    assert found == {
        "nvjet_hsh": (100e-6, 150e-6, ("aten::conv2d", "aten::cudnn_convolution")),
        "_some_kernel": (200e-6, 210e-6, ("Optimizer.step#LARS.step",)),
        "Memcpy DtoD": (160e-6, 165e-6, ()),
        "cutlass_80_gemm": (150e-6, 160e-6, (BACKWARD,)),
        "_norm_sums": (300e-6, 310e-6, ()),
    }


def test_the_work_of_the_papers_model():
    """Against figures counted elsewhere: 4.09 GMAC an image forwards, three times that with the
    backward pass but for the gradient of the views; 101 GB of batch norm, ReLU and sums."""
    with torch.device("meta"):
        model = BarlowTwins(Config())
        views = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16)
        off = torch.autocast("cpu", enabled=False)
        work = count_work(model.bfloat16(), views, off)
    stem = 64 * 147 * 112**2
    assert work.flop["convolutions"] == pytest.approx(2 * 512 * (3 * 4.087e9 - stem), rel=0.001)
    projector = 2048 * 8192 + 2 * 8192**2
    assert work.flop["products"] == 6 * 512 * projector
    assert work.forward + work.backward == sum(work.flop.values())
    assert work.bytes["norm"] == pytest.approx(101e9, rel=0.02)
    assert work.bytes["optimizer"] == 28 * sum(p.numel() for p in model.parameters())
    assert work.bytes["augmentation"] == 512 * 3 * 224**2 * 4
    assert all(p.grad is None for p in model.parameters())
