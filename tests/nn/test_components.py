"""The principal components behind typicality's residual."""

import pytest
import torch

from sage_ext.nn import Typicality


def rows(dim, rank, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = torch.randn(rank, dim, generator=g) * torch.linspace(3, 1, rank)[:, None]
    return torch.randn(count, rank, generator=g) @ shape + 0.05 * torch.randn(count, dim, generator=g)


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 1), (7, 3), (40, 6), (300, 12)])
def test_components_are_those_of_the_covariance(dim, rank, iterated, monkeypatch):
    if iterated:
        if dim <= 40:
            pytest.skip("as many features as columns of the iteration")
        monkeypatch.setattr("sage_ext.nn.typicality.EXACT", 0)
    x = rows(dim, rank, 4000)
    typicality = Typicality(1, dims=(dim,))
    typicality.fit([([part.unflatten(0, (4, -1))], None) for part in x.split(1000)])
    found = typicality.get_buffer("components_0").double()
    used = found[found.abs().sum(1) > 0]
    torch.testing.assert_close(used @ used.t(), torch.eye(len(used), dtype=torch.float64), atol=1e-5, rtol=0)
    values, vectors = torch.linalg.eigh(x.double().t() @ x.double())
    share = values.flip(0).cumsum(0) / values.sum()
    count = min(int((share < 0.95).sum()) + 1, len(found))
    assert len(used) == count
    exact = vectors.flip(1)[:, :count]
    torch.testing.assert_close(used.t() @ used, exact @ exact.t(), atol=1e-3, rtol=0)


def test_the_residual_tells_noise_from_what_is_usual():
    """White noise that hardly changes the energy of a frame multiplies its residual."""
    x = rows(40, 6, 4000)
    typicality = Typicality(1, dims=(40,))
    typicality.fit([([x.unflatten(0, (4, -1))], None)])
    typicality.eval()
    odd = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    usual, found = (typicality([v.unflatten(0, (4, -1))], None, None)[0][..., 0, :3].mean((0, 1)) for v in (x, odd))
    assert usual.abs().max() < 0.1
    assert found[2] > 0.8
    assert found[2] > 5 * found[0]


def test_many_features_take_no_square_of_them():
    typicality = Typicality(1, dims=(20_000,))
    typicality.fit([([torch.randn(2, 10, 20_000)], None)])
    assert typicality.get_buffer("components_0").shape == (32, 20_000)
