"""bt-fast as a library: what `bt_fast` exports, and the examples of docs/library.md."""

import copy
import dataclasses
import inspect
import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, write_beton
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bt_fast
from bt_fast.config import load_config
from pipelines import augment
from pipelines.order import view_keys

TINY = {"recipe": "demo", "size": 32, "batch_size": 16, "projector": (32, 16), "epochs": 1}
TINY |= {"device": "cpu", "workers": 1, "probe_every": 0, "max_steps": 2}


@pytest.mark.parametrize("name", sorted(set(bt_fast.__all__) - {"__version__"}))
def test_everything_exported_is_documented(name):
    """Every argument of a function or class is in its docstring, or a field with a comment."""
    exported = getattr(bt_fast, name)
    if isinstance(exported, bt_fast.Branch):
        return
    assert not exported.__doc__.startswith(f"{name}("), "dataclass's own"
    if dataclasses.is_dataclass(exported):
        return
    described = f"{exported.__doc__} {getattr(exported.__init__, '__doc__', '')}"
    for argument in inspect.signature(exported).parameters:
        assert re.search(rf"\b{argument}\b", described), argument


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    write_beton(tmp_path / "demo" / "out.beton", 160)
    monkeypatch.chdir(tmp_path)
    whole_run, plain_loop, *_, loader = examples()
    exec(whole_run, {})
    names: dict = {}
    exec(plain_loop, names)
    assert torch.isfinite(names["loss"])
    exec(loader, names)
    assert names["views"].shape == (256, 3, 48, 48)
    assert names["batch"].to("meta").views.is_meta  # as Lightning moves a batch


def test_the_example_of_lightning_runs(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    _, plain_loop, lightning, *_ = examples()
    names: dict = {}
    exec(plain_loop, names)
    exec(lightning, names)


def test_two_runs_in_one_process_and_one_in_a_thread(small_beton, tmp_path):
    runs = [bt_fast.pretrain(**TINY, data=small_beton, run_dir=tmp_path / name) for name in "ab"]
    with ThreadPoolExecutor(1) as thread:
        paths = {"data": str(small_beton), "run_dir": str(tmp_path / "c")}
        runs.append(thread.submit(bt_fast.pretrain, **TINY, **paths).result())
    first, *others = (run.encoder.state_dict() for run in runs)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert [record["step"] for record in runs[2].metrics] == [1, 2]
    with pytest.raises(ValueError, match="--seed cannot change when a run is resumed"):
        bt_fast.pretrain(resume=runs[2].path, seed=9)
    longer = bt_fast.pretrain(resume=str(runs[2].path), max_steps=3)
    assert [record["step"] for record in longer.metrics] == [1, 2, 3]
    config = dataclasses.replace(bt_fast.Config(**(TINY | {"max_steps": 4})), data=small_beton)
    with pytest.raises(ValueError, match="cannot change when a run is resumed"):
        bt_fast.pretrain(config, resume=runs[2].path)


def test_a_run_from_python_is_configured_as_by_flags(small_beton, tmp_path, monkeypatch):
    run = bt_fast.pretrain(**TINY, data=small_beton, run_dir=tmp_path / "run", ablation="imax")
    config = load_config(run.path, "RUN")
    assert (config.ablation, config.objective, config.lambd) == ("imax", "imax", 1.0)
    config = dataclasses.replace(config, run_dir=None)
    again = bt_fast.pretrain(config, resume=run.path, max_steps=3)
    assert again.metrics[-1]["step"] == 3
    with pytest.raises(ValueError, match="--extend 9 continues a run"):
        bt_fast.pretrain(**TINY, data=small_beton, extend=9)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        bt_fast.pretrain(**TINY, data="nowhere.beton")
    assert not list(tmp_path.glob("runs/*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="rank"):
        bt_fast.pretrain(**TINY, data=small_beton)


@pytest.mark.parametrize(
    "field,value",
    [
        ("precision", "fp16"), ("device", "tpu"), ("optimizer", "adam"), ("deterministic", "no"),
        ("epochs", "3"), ("batch_size", 32.0), ("projector", 32), ("projector", (32, "16")),
        ("data", None), ("seed", True),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        bt_fast.pretrain(**(TINY | {field: value}))


def test_a_configuration_is_no_recipe(small_beton):
    with pytest.raises(ValueError, match="leave recipe out"):
        bt_fast.pretrain(bt_fast.Config(data=small_beton), recipe="demo")


def test_of_two_threads_only_one_trains(small_beton, tmp_path, monkeypatch):
    """They would share torch's generator."""

    def other(*_) -> int:
        with ThreadPoolExecutor(1) as thread, pytest.raises(ValueError, match="another thread"):
            thread.submit(bt_fast.pretrain, **TINY, run_dir=tmp_path / "b").result()
        return 0

    monkeypatch.setattr("bt_fast.api.train_pretrain", other)
    bt_fast.pretrain(**TINY, data=small_beton, run_dir=tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_a_list_of_widths_is_a_tuple():
    assert bt_fast.Config(projector=[32, 16]).projector == (32, 16)


def test_two_view_augment_is_the_definition():
    crops = torch.randint(256, (2, 6, 40, 40, 3), dtype=torch.uint8)
    keys = np.stack([view_keys(np.arange(6), seed=0, epoch=0, view=view) for view in (0, 1)])
    views = bt_fast.TwoViewAugment()(crops, keys=keys)
    branches = bt_fast.VIEW_A, bt_fast.VIEW_B
    for ours, branch, pixels, key in zip(views.chunk(2), branches, crops, keys, strict=True):
        expected = augment.apply(pixels, augment.draw(branch, key), dtype=torch.float32)
        assert torch.equal(ours, expected)
    first_layout = bt_fast.TwoViewAugment(channels_first=True)
    assert torch.equal(first_layout(crops.movedim(4, 2), keys=keys), views)
    compiled = torch.compile(bt_fast.TwoViewAugment(), backend="eager")
    assert torch.equal(compiled(crops, keys=keys), views)


OTHER_KEYS = np.full((2, 6), 0.5), np.zeros((2, 5), np.uint64), [["a"] * 6] * 2


@pytest.mark.parametrize("keys", OTHER_KEYS)
def test_keys_of_another_kind_are_refused(keys):
    crops = torch.zeros(2, 6, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="keys must be uint64"):
        bt_fast.TwoViewAugment()(crops, keys=keys)
    with pytest.raises(ValueError, match="give one of them"):
        bt_fast.TwoViewAugment()(crops, keys=keys, generator=torch.Generator())


@pytest.mark.parametrize(
    "changes,message",
    [
        *(({"rank": r, "world_size": w}, "is not one of") for r, w in ((2, 2), (-1, 2), (0, 0))),
        ({"dataset": "a.beton"}, "must be opened by open_data, got 'a.beton'"),
        ({"crop": 16}, "must be a RandomResizedCrop, got 16"),
        ({"device": "cuda"}, "no usable GPU"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must fit into 64 bits"),
    ],
)
def test_arguments_of_a_loader_are_checked(changes, message, small_beton, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    dataset, crop = bt_fast.open_data(small_beton), bt_fast.RandomResizedCrop(size=16)
    arguments = {"dataset": dataset, "crop": crop, "batch_size": 4} | changes
    with pytest.raises(ValueError, match=message):
        bt_fast.open_loader("native", **arguments)


def test_two_view_augment_draws_from_a_generator():
    crops = torch.randint(256, (2, 6, 40, 40, 3), dtype=torch.uint8)
    module = bt_fast.TwoViewAugment(dtype=torch.bfloat16)
    first, again = (module(crops, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.bfloat16
    assert not torch.equal(first, module(crops, generator=torch.Generator().manual_seed(4)))


def test_a_default_device_of_the_user_changes_nothing(small_beton):
    """As torch.set_default_device("cuda") does for every tensor without a device."""
    with torch.device("meta"):
        dataset = bt_fast.open_data(small_beton)
        crop = bt_fast.RandomResizedCrop(size=24)
        batch = next(iter(bt_fast.open_loader("native", dataset, crop, batch_size=4)))
        views = bt_fast.TwoViewAugment()(batch.views)
    assert views.shape == (8, 3, 24, 24) and views.isfinite().all()


def test_another_layout_or_dtype_is_refused():
    with pytest.raises(ValueError, match="view_b must be a Branch, got None"):
        bt_fast.TwoViewAugment(view_b=None)
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        bt_fast.TwoViewAugment(dtype=torch.uint8)
    for shape, channels_first in (((2, 4, 3, 8, 8), False), ((2, 4, 8, 8, 3), True)):
        module = bt_fast.TwoViewAugment(channels_first=channels_first)
        with pytest.raises(ValueError, match="crops must be uint8"):
            module(torch.zeros(shape, dtype=torch.uint8))


def test_lars_takes_a_closure_and_restores_its_state():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(8, 4)

    def step(optimizer: bt_fast.LARS, model: nn.Module) -> torch.Tensor:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure)

    optimizer = bt_fast.LARS(model.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = model(x).square().sum()
    assert torch.equal(step(optimizer, model), before)
    assert steps == [1]
    twin = copy.deepcopy(model)
    restored = bt_fast.LARS(twin.parameters(), lr=9.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, model), step(restored, twin)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    copied_model, copied = copy.deepcopy((model, optimizer))
    step(optimizer, model), step(copied, copied_model)
    assert all(map(torch.equal, model.parameters(), copied_model.parameters()))


@pytest.mark.parametrize("name,value", [("lr", math.nan), ("lr", -1.0), ("momentum", 1.0)])
def test_lars_refuses_values_that_cannot_train(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        bt_fast.LARS([torch.zeros(2, 2)], **({"lr": 0.1} | {name: value}))
    with pytest.raises(ValueError, match=f"{name} must be"):
        bt_fast.LARS([{"params": [torch.zeros(2, 2)], name: value}], lr=0.1)


@pytest.mark.parametrize("z", [np.zeros((4, 2)), torch.zeros(4, 2, dtype=torch.int64)], ids=type)
def test_the_loss_refuses_what_is_not_embeddings(z):
    with pytest.raises(ValueError, match=r"z_b must be a floating-point tensor \[n, D\]"):
        bt_fast.barlow_twins_loss(torch.zeros(4, 2), z)


def gradient_under_ddp(world, warned: bool, layers: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    both: dict = {}
    exec(next(example for example in examples() if "class TwoViews" in example), both)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4))[:layers].double()
    views = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1)).double()
    local = views if world.group is None else views.chunk(world.size, 1)[world.rank]
    parallel = both["TwoViews"](model)
    if world.group is not None:
        parallel = DistributedDataParallel(parallel)
    z_a, z_b = parallel(*local)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bt_fast.barlow_twins_loss(z_a, z_b)
    assert any("of this rank's batch alone" in str(w.message) for w in caught) == warned
    loss = bt_fast.barlow_twins_loss(z_a, z_b, group=world.group, ddp=world.group is not None)
    loss.backward()
    return {"loss": loss.detach(), "gradient": model[0].weight.grad}


def test_under_ddp_the_gradient_is_that_of_one_process():
    (alone,) = run_ranks(1, gradient_under_ddp, False)
    for found in run_ranks(2, gradient_under_ddp, True):
        assert torch.allclose(found["loss"], alone["loss"], rtol=1e-12)
        assert torch.allclose(found["gradient"], alone["gradient"], rtol=1e-10)
    # Batch norm's buffers, which DDP broadcasts in every forward pass, are no obstacle.
    first, second = run_ranks(2, gradient_under_ddp, True, 2)
    assert torch.equal(first["gradient"], second["gradient"])
