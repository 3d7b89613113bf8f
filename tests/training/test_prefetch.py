"""Batches made ahead: the same ones, few of them, by a thread that ends, whose errors are the caller's."""

import contextlib
import dataclasses
import functools
import gc
import threading
import time
import traceback
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from sage_ext.training import trainer
from sage_ext.training.checkpoint import load_checkpoint
from sage_ext.training.prefetch import THREAD, Prefetch, pinned
from sage_ext.training.rehearsal import Rehearsal
from sage_ext.training.trainer import BEST, LAST, TrainConfig, train

quiet = functools.partial(train, progress=False)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture(autouse=True)
def none_is_left_behind():
    yield
    assert threads() == []


def settle(condition):
    """Wait until it holds; then a little longer, so that what should not happen has the time to."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_items_come_in_order_and_few_ahead(ahead):
    made, where, closed = [], set(), []

    def source():
        try:
            for i in range(8):
                made.append(i)
                where.add(threading.current_thread().name)
                yield i
        finally:
            closed.append(True)

    with Prefetch(source(), ahead) as items:
        for taken, item in enumerate(items):
            assert item == taken
            expected = min(taken + 1 + ahead, 8)
            settle(lambda expected=expected: len(made) >= expected)
            assert len(made) == expected
        assert taken == 7
        assert next(items, "end") == "end"  # again and again
    assert closed == [True]
    assert where == {THREAD if ahead else threading.current_thread().name}
    assert next(items, "end") == "end"


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_an_error_comes_after_the_items_before_it_with_its_own_traceback(ahead):
    def breaks():
        raise KeyError("deep inside")

    def source():
        yield 1
        yield 2
        breaks()

    got = []
    with pytest.raises(KeyError, match="deep inside") as error, Prefetch(source(), ahead) as items:
        got.extend(iter(items.__next__, None))
    assert got == [1, 2]
    names = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert names[-2:] == ["source", "breaks"]


def test_an_exception_of_the_caller_ends_the_thread_and_frees_what_was_made():
    alive = []

    def source():
        while True:
            item = torch.zeros(3)
            alive.append(weakref.ref(item))
            yield item
            del item

    def caller():
        with Prefetch(source(), 2) as items:
            next(items)
            settle(lambda: len(alive) == 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caller()
    assert threads() == []
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_a_caller_that_stops_waits_for_the_item_in_the_making():
    begun, ended = threading.Event(), []

    def source():
        yield 0
        begun.set()
        time.sleep(0.1)
        ended.append(True)
        yield 1

    with Prefetch(source(), 1) as items:
        next(items)
        begun.wait(20)
    assert ended == [True]


def assert_same_training(a, b):
    """All but the configuration, in which they differ."""
    assert (a / trainer.LOG).read_bytes() == (b / trainer.LOG).read_bytes()
    assert (a / BEST).read_bytes() == (b / BEST).read_bytes()
    one, two = load_checkpoint(a / LAST), load_checkpoint(b / LAST)
    for state in (one, two):
        del state["config"]
    leaves = [tree_flatten(state) for state in (one, two)]
    assert leaves[0][1] == leaves[1][1]
    for x, y in zip(leaves[0][0], leaves[1][0], strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.fixture(scope="module")
def without(data, tmp_path_factory):
    config = TrainConfig(
        str(data), dim=8, stages=2, blocks=2, window=2, hop=4 / 3, batch_size=4, epochs=2, lr=3e-3, warmup=3, threads=1,
        checkpoint_every=2, prefetch=0, rehearsal=Rehearsal(probability=0.9),
    )  # fmt: skip
    run = tmp_path_factory.mktemp("runs") / "without"
    quiet(config, run)
    return config, run


@pytest.mark.parametrize("more", [{"prefetch": 1}, {"prefetch": 2}, {"prefetch": 1, "num_workers": 2}])
def test_training_is_the_same_to_the_bit(without, tmp_path, more):
    config, run = without
    quiet(dataclasses.replace(config, **more), tmp_path / "run")
    assert_same_training(tmp_path / "run", run)
    assert threads() == []


def test_interrupted_then_resumed_with_another_depth(without, tmp_path, monkeypatch):
    config, run = without
    step = trainer.Training._one_step

    def killed(self, batch):
        if self.step == 9:
            assert len(threads()) == 1
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(trainer.Training, "_one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet(dataclasses.replace(config, prefetch=2), tmp_path / "run")
    assert threads() == []
    monkeypatch.undo()
    quiet(dataclasses.replace(config, prefetch=1), tmp_path / "run", resume=True)
    assert_same_training(tmp_path / "run", run)


def test_max_steps_inside_an_epoch_leaves_no_thread(without, tmp_path):
    config, _ = without
    quiet(dataclasses.replace(config, max_steps=2, prefetch=2), tmp_path / "run")
    assert threads() == []
    assert load_checkpoint(tmp_path / "run" / LAST)["at"]["step"] == 2


def test_an_error_in_the_rehearsal_reaches_the_caller_of_train(without, tmp_path, monkeypatch):
    def broken(self, *arguments):
        assert threading.current_thread().name == THREAD
        raise ZeroDivisionError("no window")

    monkeypatch.setattr(Rehearsal, "_draw_span", broken)
    with pytest.raises(ZeroDivisionError, match="no window") as error:
        quiet(dataclasses.replace(without[0], prefetch=1), tmp_path / "run")
    assert threads() == []
    names = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert names[0] != "_work"
    assert names[-1] == "broken"
    assert "run_to_end" in names


def test_for_a_gpu_batches_are_pinned_in_the_thread_and_copied_without_waiting(without, tmp_path, monkeypatch):
    """The calls stand in for the GPU: nothing here has one."""
    config, run = without
    pins, copies, to, begin = [], [], Tensor.to, trainer.Training.__init__

    def pins_too(self, *arguments):
        begin(self, *arguments)
        assert self.pins is False
        self.pins = True

    def pin_memory(tensor):
        pins.append(threading.current_thread().name)
        copy = tensor.clone()
        copy.pinned_here = True
        return copy

    def spied(tensor, *arguments, **options):
        if hasattr(tensor, "pinned_here"):
            copies.append(options)
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(trainer.Training, "__init__", pins_too)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", spied)
    quiet(dataclasses.replace(config, prefetch=1), tmp_path / "run")
    steps = load_checkpoint(run / LAST)["at"]["step"]
    # Two modalities, their quality, present, frame, labels and valid.
    assert len(pins) == copies.count({"non_blocking": True}) == 8 * steps
    assert set(pins) == {THREAD}
    assert_same_training(tmp_path / "run", run)


def test_pinning_keeps_what_is_no_tensor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    tree = {"a": torch.zeros(2), "b": {"c": torch.ones(1), "d": "text"}, "e": None}
    found = pinned(tree, torch.device("cuda"))
    assert found["a"].tolist() == [1, 1]
    assert found["b"]["c"].tolist() == [2]
    assert (found["b"]["d"], found["e"]) == ("text", None)
