"""What a frame says about itself (csrc/math/frame.h): the reference against the modules that the model is made of."""

import pytest
import torch

from sage_ext import _C, reference
from sage_ext.nn import Quality, Typicality, foreign


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
@pytest.mark.parametrize("residual", [False, True])
def test_typicality_is_that_of_the_module(window, gaps, residual):
    inputs, present = draw()
    module = Typicality(2, window, dims=(5, 9) if residual else None).double().eval()
    g = torch.Generator().manual_seed(1)
    module.mean.normal_(generator=g)
    module.var.copy_(torch.tensor([[0.3, 2.0, 1.0], [1e-9, 5.0, 0.1]])[:, : module.energies])  # one below the floor
    components = None
    if residual:
        components = [module.get_buffer(f"components_{m}") for m in range(2)]
        for basis in components:
            basis[:3] = torch.linalg.qr(torch.randn(basis.shape[1], 3, generator=g, dtype=torch.float64)).Q.t()
    valid = present if gaps else None
    blanked = inputs if valid is None else [torch.where(valid[..., m, None], x, 0.0) for m, x in enumerate(inputs)]
    expected, _ = module(blanked, valid, None)
    found = reference.typicality(inputs, module.mean, module.var, valid, window=window, components=components)
    assert found.shape[-1] == module.features == (6 if residual else 4)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found.abs().max() == _C.constants["typicality_limit"]
    if gaps:
        assert not found[~present].any()


def test_a_motionless_silence_is_as_unusual_as_can_be():
    level = reference.typicality([torch.zeros(1, 3, 4)], torch.zeros(1, 2), torch.full((1, 2), 1e-4))[0, :, 0]
    limit = _C.constants["typicality_limit"]
    assert level.tolist() == [[-limit, 0, limit, 0], *[[-limit, -limit, limit, limit]] * 2]  # no step into frame 0


def test_the_constants_are_those_of_the_modules():
    """The modules take them from C++, or say the same."""
    module = Typicality(1)
    assert module.clamp == Quality([1]).clamp == _C.constants["typicality_limit"]
    assert Quality([1]).halflife == _C.constants["quality_halflife"]
    assert _C.constants["foreign_margin"] == foreign.MARGIN
    assert torch.nn.LayerNorm(1).eps == _C.constants["norm_eps"]
    assert sorted(_C.constants) == [
        "energy_floor", "foreign_margin", "log_precision_limit", "norm_eps", "quality_halflife", "typicality_limit",
        "variance_floor",
    ]  # fmt: skip
