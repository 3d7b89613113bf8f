"""The training step as a GPU runs it, as far as a CPU can tell: nothing here has run on a GPU."""

import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sage_ext.training import trainer
from sage_ext.training.checkpoint import load_checkpoint
from sage_ext.training.trainer import BEST, LAST, TrainConfig, train

quiet = functools.partial(train, progress=False)


def tensors(*values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: within, operators are noted with the memory and the numbers they had, and leave no
    trace; `replay` runs them on that memory with those numbers."""

    def __enter__(self):
        self.calls, self.before, self.generator = [], {}, torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for x in tensors([arguments.get(name) for name in written]):
            self.before.setdefault(id(x), (x, x.clone()))
        out = func(*args, **kwargs)
        assert not [x for x in tree_leaves(out) if isinstance(x, (bool, int, float))], f"{func} waits for the device"
        memory = {x.untyped_storage().data_ptr() for x in tensors(args, kwargs)}
        self.calls.append(
            (func, args, kwargs, [None if x.untyped_storage().data_ptr() in memory else x for x in tensors(out)])
        )
        return out

    def __exit__(self, *raised):
        super().__exit__(*raised)
        for x, value in self.before.values():
            x.data.copy_(value)
        torch.set_rng_state(self.generator)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                for own, found in zip(outs, tensors(func(*args, **kwargs))):
                    if own is not None:
                        own.copy_(found)


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs; the list of those captured."""
    made = []

    def graph():
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(trainer.Training, "stream", lambda self: trainer.nullcontext())
    return made


def with_graph(config):
    config = dataclasses.replace(config)
    object.__setattr__(config, "graph", True)  # past the question for a GPU
    return config


def assert_same_weights(a, b):
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in (BEST, LAST):
        x, y = load_checkpoint(a / name)["model"], load_checkpoint(b / name)["model"]
        assert all(torch.equal(x[key], y[key]) for key in x), name


def losses_of(run):
    return [float(line.split(",")[3]) for line in (run / "log.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"fusion": "concat"}], ids=str)
def test_a_captured_step_is_the_step(tiny, tmp_path, graphs, monkeypatch, change):
    """Rates, dropout, moments of the optimizer, batches: nothing of the captured step stays there."""
    config = dataclasses.replace(tiny, dropout=0.2, max_steps=14, **change)
    quiet(config, tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Captured, "WARM_UP", 1000)
        quiet(with_graph(config), tmp_path / "uncaptured")
    assert not graphs
    quiet(with_graph(config), tmp_path / "captured")
    (graph,) = graphs
    assert len(graph.calls) > 200
    assert_same_weights(tmp_path / "uncaptured", tmp_path / "captured")
    assert losses_of(tmp_path / "plain") == pytest.approx(
        losses_of(tmp_path / "captured"), rel=1e-5
    )  # rates in float32


def test_a_captured_run_is_resumed(tiny, tmp_path, graphs, monkeypatch):
    config = with_graph(dataclasses.replace(tiny, max_steps=12, dropout=0.2))
    quiet(config, tmp_path / "whole")
    real, made = trainer.Training._one_step, []

    def killed(self, batch):
        made.append(batch)
        if len(made) == 9:
            raise KeyboardInterrupt
        real(self, batch)

    monkeypatch.setattr(trainer.Training, "_one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet(config, tmp_path / "run")
    monkeypatch.setattr(trainer.Training, "_one_step", real)
    monkeypatch.setattr(trainer, "_check_same", lambda *_: None)  # it would ask for a GPU
    quiet(config, tmp_path / "run", resume=True)
    assert len(graphs) == 3
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_step_that_waits_for_the_device_cannot_be_captured(tiny, tmp_path, graphs, monkeypatch):
    """So the tests above tell."""
    real = trainer.Training._update

    def curious(self, *inputs):
        told, *rest = real(self, *inputs)
        assert told[0].item() == told[0].item()
        return told, *rest

    monkeypatch.setattr(trainer.Training, "_update", curious)
    with pytest.raises(AssertionError, match="waits for the device"):
        quiet(with_graph(tiny), tmp_path / "run")


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match=r"graph: expected False .* on device 'cpu'"):
        TrainConfig("unused", graph=True)
    assert TrainConfig("unused", graph=True, device="cuda:1").graph


@pytest.mark.parametrize("precision", trainer.PRECISIONS)
def test_a_compiled_step_is_one_graph_and_the_step(tiny, tmp_path, monkeypatch, precision):
    real, made = torch.compile, []

    def compile_(function, **options):
        made.append(options)
        return real(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    config = dataclasses.replace(tiny, dropout=0.0, epochs=2, precision=precision)
    quiet(config, tmp_path / "plain")
    quiet(dataclasses.replace(config, compile=True), tmp_path / "compiled")
    assert made == [{}]
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-3)
