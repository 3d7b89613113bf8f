"""torch.compile of the models with inductor: one size, training; and each mode. Any size, without code."""

import pytest
import torch
from tiny import DIMS, close, draw, tiny, tiny_fusion

FUSED = ("fused", "weights", "confidence", "stage")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_the_fusion():
    fusion = tiny_fusion()
    features, present = draw()
    close(torch.compile(fusion, fullgraph=True)(features, present), fusion(features, present), fields=FUSED)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_model(mode):
    """ "reduce-overhead" is about CUDA graphs: on the CPU it is the default mode, and only has to work."""
    model = tiny()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, mode=mode)(*draw(1)), model(*draw(1)))


def graphs_counted(function):
    """`function` compiled for any size, and the list of the graphs so far; no code is generated from them."""
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, fullgraph=True, dynamic=True, backend=count), graphs


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny, tiny_fusion])
def test_one_graph_serves_any_size(build):
    """The first sizes equal no number that is fixed. A size of 1 has a graph of its own."""
    model, fields = build(), FUSED if build is tiny_fusion else ("prediction", "weights", "confidence", "stage")
    compiled, graphs = graphs_counted(model)
    with torch.no_grad():
        for batch, frames in ((7, 23), (2, 64), (3, 3)):
            inputs = draw(frames, batch, frames)
            close(compiled(*inputs), model(*inputs), fields=fields)
        assert len(graphs) == 1
        close(compiled(*draw(5, 1, 23)), model(*draw(5, 1, 23)), fields=fields)
        assert len(graphs) == 2


def test_sizes_that_are_equal_at_first_are_one_to_pytorch():
    """What docs/deploy.md says: with none of our code in it. Where this fails, PyTorch has changed, and the page is to follow."""

    def two_modalities(x):
        if x.shape[2] != 2:
            raise ValueError
        return 2 * x

    for first, count in ((2, 2), (7, 1)):
        torch.compiler.reset()
        compiled, graphs = graphs_counted(two_modalities)
        for batch in (first, 3, 4):
            compiled(torch.zeros(batch, 20, 2))
        assert len(graphs) == count


@pytest.mark.slow
def test_the_fusion_trains_compiled():
    fusion = tiny_fusion()
    features, present = draw()
    x = {name: v.requires_grad_() for name, v in features.items()}
    grads = []
    for run in (fusion, torch.compile(fusion, fullgraph=True)):
        fusion.zero_grad()
        out = run(x, present)
        (out.fused.square().mean() + out.weights[..., 0].mean()).backward()
        grads.append([p.grad.clone() for p in [*fusion.parameters(), *x.values()] if p.grad is not None])
        for v in x.values():
            v.grad = None
    assert len(grads[0]) > len(DIMS)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
