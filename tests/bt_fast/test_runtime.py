from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.runtime import choose_runtime


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.mark.parametrize("ranks,mode", [(1, "reduce-overhead"), (2, "default")])
def test_one_gpu_replays_cuda_graphs(two_gpus, ranks, mode):
    world = World(rank=ranks - 1, size=ranks, local_rank=ranks - 1, local_size=ranks)
    runtime = choose_runtime("auto", "bf16", "auto", world)
    assert runtime.compile == mode and runtime.device == torch.device("cuda", ranks - 1)


def test_a_thread_replays_none(two_gpus):
    with ThreadPoolExecutor() as threads:
        assert threads.submit(choose_runtime, "cuda", "bf16", "auto").result().compile == "default"


def test_a_named_mode_and_a_cpu_keep_theirs(two_gpus):
    assert choose_runtime("cuda", "bf16", "default", ALONE).compile == "default"
    assert choose_runtime("cpu", "fp32", "auto", ALONE).compile == "off"
