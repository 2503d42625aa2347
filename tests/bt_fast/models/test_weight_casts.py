"""A step with a stage's weights cast together equals a step with autocast's casts, bit for bit."""

import copy

import pytest
import torch
from operators import Operators
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bt_fast.config import Config
from bt_fast.distributed.collectives import World
from bt_fast.loss import barlow_twins_loss
from bt_fast.models import networks
from bt_fast.models.networks import BarlowTwins


def train_a_step(world: World, encoder: str, together: bool) -> dict[str, torch.Tensor]:
    """Loss, gradients and running statistics under bf16 autocast, with DDP on several ranks.
    Convolutions are 1 x 1 and 3 x 3, channels-last."""
    torch.manual_seed(0)
    model = BarlowTwins(Config(encoder=encoder, projector=(32, 32), small_images=True))
    for layer in model.modules():  # zero weights would hide the residual branches
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
    model.to(memory_format=torch.channels_last)
    views = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(world.rank))
    views = views.to(torch.bfloat16, memory_format=torch.channels_last)
    embed = model if world.group is None else DistributedDataParallel(model)
    with pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(networks, "_forward_cast", lambda stage, x: stage(x))
        with torch.autocast("cpu", torch.bfloat16):
            z_a, z_b = embed(views).chunk(2)
        loss = barlow_twins_loss(z_a, z_b, group=world.group)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.stride() == p.stride(), name
    return found | dict(model.named_buffers()) | {"loss": loss.detach(), "z": z_a.detach()}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_a_step_equals_autocasts(encoder, num_ranks):
    found = [run_ranks(num_ranks, train_a_step, encoder, together) for together in (True, False)]
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def casts_of_lists(operators: Operators) -> list[list[torch.dtype]]:
    calls = [call for call in operators.calls if call.name == "_foreach_copy_"]
    return [[source.dtype for source in call.arguments[1]] for call in calls]


def build_stage() -> nn.Module:
    return networks.build_encoder("resnet18").layer2  # five convolutions


def test_a_stages_weights_are_cast_once_in_each_pass():
    stage, x = build_stage(), torch.randn(4, 64, 8, 8).bfloat16()
    names = list(stage.state_dict())
    with Operators("aten::") as operators, torch.autocast("cpu", torch.bfloat16):
        networks._forward_cast(stage, x)[0].sum().backward()
    assert casts_of_lists(operators) == [[torch.float32] * 5, [torch.bfloat16] * 5]
    single = [call.arguments[0] for call in operators.calls if call.name == "_to_copy"]
    assert all(tensor.ndim <= 1 for tensor in single)
    assert list(stage.state_dict()) == names
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in stage.parameters())


@pytest.mark.parametrize("case", ["evaluation", "no autocast", "bf16 weights", "frozen"])
def test_no_weights_are_cast_together_outside_mixed_precision_training(case):
    stage, x = build_stage(), torch.randn(4, 64, 8, 8)
    if case == "evaluation":
        stage.eval()
    if case == "bf16 weights":
        stage, x = stage.bfloat16(), x.bfloat16()
    stage.requires_grad_(case != "frozen")
    reference = copy.deepcopy(stage)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case != "no autocast")
    with Operators("aten::") as operators, autocast:
        y = networks._forward_cast(stage, x)
        assert not casts_of_lists(operators)
        assert torch.equal(y, reference(x))


def test_a_compiled_stage_is_left_to_the_compiler():
    """It is one graph, without casts of lists."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    stage, x = build_stage(), torch.randn(4, 64, 8, 8).bfloat16()
    compiled = torch.compile(
        lambda x: networks._forward_cast(stage, x), backend=backend, fullgraph=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
    assert len(graphs) == 1 and "_foreach_copy_" not in graphs[0].code
