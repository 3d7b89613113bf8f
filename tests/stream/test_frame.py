"""What a frame says about itself (csrc/math/frame.h): the reference against the modules that the model is made of."""

import pytest
import torch

from sage_ext import _C, reference
from sage_ext.models import SAGE
from sage_ext.nn import Typicality


def draw(batch=3, frames=60, dims=(5, 9)):
    """Inputs that are loud, quiet, frozen and gone by turns, and presence with gaps longer than the window."""
    g = torch.Generator().manual_seed(0)
    loud = torch.randn(batch, frames, 1, generator=g, dtype=torch.float64).cumsum(1).exp()
    inputs = [loud * torch.randn(batch, frames, d, generator=g, dtype=torch.float64) for d in dims]
    inputs[0][0, 10:20] = inputs[0][0, 10:11]
    inputs[1][1, 5:40] = 0
    present = torch.rand(batch, frames, len(dims), generator=g) > 0.2
    present[2, 12:40, 1] = False
    return inputs, present


@pytest.mark.parametrize("window", [2, 16, 100])
@pytest.mark.parametrize("gaps", [False, True])
def test_typicality_is_that_of_the_module(window, gaps):
    inputs, present = draw()
    module = Typicality(2, window).double().eval()
    module.mean.normal_(generator=torch.Generator().manual_seed(1))
    module.var.copy_(torch.tensor([[0.3, 2.0], [1e-9, 5.0]]))  # one below the floor
    valid = present if gaps else None
    blanked = inputs if valid is None else [torch.where(valid[..., m, None], x, 0.0) for m, x in enumerate(inputs)]
    expected, _ = module(blanked, valid, None)
    found = reference.typicality(inputs, module.mean, module.var, valid, window=window)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found.abs().max() == _C.constants["typicality_limit"]
    if gaps:
        assert not found[~present].any()


def test_a_motionless_silence_is_as_unusual_as_can_be():
    level = reference.typicality([torch.zeros(1, 3, 4)], torch.zeros(1, 2), torch.full((1, 2), 1e-4))[0, :, 0]
    limit = _C.constants["typicality_limit"]
    assert level.tolist() == [[-limit, 0, limit, 0], *[[-limit, -limit, limit, limit]] * 2]  # no step into frame 0


@pytest.mark.parametrize("fusion", ["reliability", "uniform"])
@pytest.mark.parametrize("gaps", [False, True])
def test_precision_is_that_of_the_model(fusion, gaps):
    model = SAGE({"a": 3, "b": 4}, dim=8, fusion=fusion)
    sharpness = 1.0
    if fusion == "reliability":
        model.fusion.sharpening.data.fill_(0.2)
        sharpness = model.fusion.sharpness
    confidence = torch.linspace(0, 1, 2 * 5 * 2).view(2, 5, 2)
    known = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)) > 0.4 if gaps else None
    with torch.no_grad():
        found = reference.frame_precision(confidence, sharpness, known)
        torch.testing.assert_close(found, model._precision(confidence, known), atol=0, rtol=1e-6)
    assert found[..., 1:].sum(-1).allclose(found[..., 0])
    assert found.max() <= 2 * torch.tensor(_C.constants["log_precision_limit"]).exp() * (1 + 1e-6)


def test_the_constants_are_those_of_the_modules():
    """The modules take them from C++, or say the same."""
    module = Typicality(1)
    assert module.clamp == _C.constants["typicality_limit"]
    assert torch.nn.LayerNorm(1).eps == _C.constants["norm_eps"]
    assert sorted(_C.constants) == [
        "confidence_margin", "energy_floor", "log_precision_limit", "norm_eps", "typicality_limit", "variance_floor"
    ]  # fmt: skip
