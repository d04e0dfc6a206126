"""The average of the weights: by hand, against torch's own and against timm's."""
import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import ema_decay, ema_reached, ema_update_, make_average


def make_net(seed=0):
    """Return a network with a BatchNorm that has seen data; every tensor is random."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    take_step(net)
    return net


def take_step(net):
    """Move every parameter, and the buffers by a forward pass, as a training step does."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        net.train()(torch.randn(8, 3, 8, 8))


def float_state(net):
    """Return the floats of a state dict, in float64: parameters and running statistics."""
    state = net.state_dict()
    return {name: v.double().clone() for name, v in state.items() if v.is_floating_point()}


def test_an_update_by_hand():
    net = make_net()
    average = make_average(net)
    expected = float_state(net)
    for decay in (0.1, 0.5, 0.9, 0.99):
        take_step(net)
        ema_update_(average, net, decay)
        for name, value in float_state(net).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    found = float_state(average)
    assert {"1.running_mean", "1.running_var", "0.weight"} <= found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    # How many batches were counted has no average.
    assert average[1].num_batches_tracked == net[1].num_batches_tracked == 5


def test_decay_0_copies_and_1_freezes():
    net, average = make_net(0), make_average(make_net(1))
    before = float_state(average)
    ema_update_(average, net, 1)
    for name, value in float_state(average).items():
        assert torch.equal(value, before[name])
    ema_update_(average, net, 0)
    for name, value in average.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_the_average_starts_as_the_model_and_leaves_it_alone():
    net = make_net()
    average = make_average(net)
    before = copy.deepcopy(net.state_dict())
    for name, value in average.state_dict().items():
        assert torch.equal(value, before[name])
    ema_update_(average, make_net(1), 0.5)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_the_average_of_a_half_model_is_in_float32():
    net = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    average = make_average(net)
    nn.init.constant_(net.weight, 1 + 2 ** -7)      # the next bfloat16
    for _ in range(10):
        ema_update_(average, net, 0.999)
    # In bfloat16 steps of a thousandth of the way would all be lost.
    expected = torch.full((1, 2), 1 + 2 ** -7 * (1 - 0.999 ** 10))
    torch.testing.assert_close(average.weight.detach(), expected, rtol=1e-6, atol=0)


def test_against_torch():
    net = make_net()
    reference = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    take_step(net)
    reference.update_parameters(net)        # the first update copies
    average = make_average(net)
    for _ in range(5):
        take_step(net)
        reference.update_parameters(net)
        ema_update_(average, net, 0.8)
    theirs = float_state(reference.module)
    for name, value in float_state(average).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_timm(dtype):
    pytest.importorskip("timm", "1.0.31")       # the average of earlier ones knows no dtype
    from timm.utils import ModelEmaV3

    net = make_net().to(dtype)
    reference = ModelEmaV3(net, decay=0.8, use_warmup=False, dtype=torch.float32)
    average = make_average(net)
    for _ in range(5):
        take_step(net.float())
        net.to(dtype)
        reference.update(net)
        ema_update_(average, net, 0.8)
    theirs = reference.module.state_dict()
    for name, value in average.state_dict().items():    # the count of batches among them
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_the_decay_warms_up():
    found = [ema_decay(0.9, update) for update in (0, 1, 8, 80, 81)]
    assert found == pytest.approx([1 / 10, 2 / 11, 9 / 18, 81 / 90, 0.9])
    assert ema_decay(0.0, 50) == 0
    assert ema_decay(0.9, -1) == 0      # in a warm start
    assert ema_reached(0.99) == 890 and ema_reached(0.999) == 8990
    for decay in (0.0, 0.1, 0.5, 0.9, 0.97, 0.99, 0.996, 0.999):
        first = ema_reached(decay)
        assert ema_decay(decay, first) == pytest.approx(decay, abs=1e-12)
        assert first == 0 or ema_decay(decay, first - 1) < decay
