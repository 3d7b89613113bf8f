"""The layers of SAGE by themselves: the memory is its sum, dropout takes whole channels."""

import pytest
import torch

from sage_ext.models.layers import ChannelDropout, PrecisionMemory


def test_dropout_takes_a_channel_for_the_whole_sequence():
    torch.manual_seed(0)
    x = torch.rand(40, 9, 25) + 0.5
    dropout = ChannelDropout(0.3)
    y = dropout(x)
    kept = y[:, :1] != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.7, 0.0))
    assert 0.65 < kept.float().mean() < 0.75  # 1000 draws: three standard deviations are 0.04
    assert dropout.eval()(x) is x
    assert ChannelDropout(0.0)(x) is x


# -------------------------------------------------------------------------------------------------------------- memory
def direct_memory(memory, x, precision):
    """The docstring's sum in float64, one matrix of all pairs of frames."""
    x, p = x.double(), precision.double()
    gap = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    out = []
    for r, halflife in enumerate(memory.halflives):
        share = torch.where((gap >= 0) | (not memory.causal), 0.5 ** (gap.abs().double() / halflife), 0.0) * p[:, None]
        total = share.sum(2, keepdim=True)
        counted = torch.where(share > 0, share / p[:, None].clamp(min=1e-300), 0.0).sum(2, keepdim=True)
        mean = total / counted.clamp(min=1e-300)  # precision of the frames that count
        out.append(share @ x / (memory.log_prior[r].double().exp() * mean + total).clamp(min=1e-300))
    return torch.cat(out, -1) @ memory.mix.weight.double().T + memory.mix.bias.double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("frames", [1, 63, 64, 65, 150])
def test_memory_is_the_precision_weighted_mean(causal, frames):
    torch.manual_seed(0)
    memory = PrecisionMemory(5, (2.0, 30.5), causal)
    with torch.no_grad():
        memory.log_prior.normal_()
    x, precision = torch.randn(2, frames, 5), torch.randn(2, frames).mul(3).exp() * (torch.rand(2, frames) > 0.3)
    expected = direct_memory(memory, x, precision)
    out, _ = memory(x, precision, None)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    out, _ = memory.double()(x.double(), precision.double(), None)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-7)


def test_memory_holds_through_frames_without_precision():
    torch.manual_seed(0)
    memory = PrecisionMemory(4, (8.0,), True)
    with torch.no_grad():
        memory.log_prior.fill_(-30.0)
    x, precision = torch.randn(1, 90, 4, requires_grad=True), torch.ones(1, 90)
    precision[:, 20:] = 0
    out, _ = memory(x, precision, None)
    torch.testing.assert_close(out[:, 20:], out[:, 19:20].expand(-1, 70, -1), atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert (x.grad[:, :20] != 0).all()
    assert (x.grad[:, 20:] == 0).all()


def test_memory_does_not_fade_where_all_frames_are_poor():
    """Only how precise frames are against each other counts."""
    torch.manual_seed(0)
    memory = PrecisionMemory(4, (8.0, 32.0), True)
    x, precision = torch.randn(2, 90, 4), 0.5 + torch.rand(2, 90)
    torch.testing.assert_close(
        memory(x, 1e-4 * precision, None)[0], memory(x, precision, None)[0], atol=1e-5, rtol=1e-4
    )


def test_memory_gradients():
    torch.manual_seed(0)
    memory = PrecisionMemory(3, (2.0, 9.0), True).double()
    x = torch.randn(2, 70, 3, dtype=torch.float64, requires_grad=True)
    precision = torch.rand(2, 70, dtype=torch.float64).requires_grad_()
    sums = (0.5 + torch.rand(2, 2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: memory(*a)[0], (x, precision, sums), fast_mode=True)
