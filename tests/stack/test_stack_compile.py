"""torch.compile of the models with inductor: one size, any size, training; and each mode."""

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


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny, tiny_fusion])
def test_any_size_takes_few_graphs(build):
    """Six sizes, at most three graphs."""
    model, fields = build(), FUSED if build is tiny_fusion else ("prediction", "weights", "confidence", "stage")
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._inductor.compile(graph, example)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for batch, frames in ((2, 20), (3, 63), (2, 64), (4, 65), (3, 300), (2, 3)):
            inputs = draw(frames, batch, frames)
            close(compiled(*inputs), model(*inputs), fields=fields)
        assert len(graphs) <= 3
        close(compiled(*draw(5, 1, 1)), model(*draw(5, 1, 1)), fields=fields)


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
