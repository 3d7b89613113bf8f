"""StreamingCCC against one look at all the data, in every mode, and the torchmetrics adapter against torchmetrics."""

import copy
import io
import math
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scores import numpy_ccc

from sage_ext import functional
from sage_ext.metrics import StreamingCCC

MODES = [{}, {"window": 7}, {"window": 500}, {"halflife": 9.0}]


def draw(seed=0, lead=(3,), frames=60, targets=2):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(*lead, frames, targets, generator=g)
    pred = 0.8 * target + 0.5 * torch.randn(*lead, frames, targets, generator=g) + 0.1
    return pred, target, torch.rand(*lead, frames, generator=g) > 0.2


def feed(metric, pred, target, mask, points):
    edges = sorted({0, pred.shape[-2], *(p % pred.shape[-2] for p in points)})
    for a, b in pairwise(edges):
        metric.update(pred[..., a:b, :], target[..., a:b, :], mask[..., a:b])
    return metric


def weighted_ccc(p, t, w):
    w = w / w.sum()
    mp, mt = w @ p, w @ t
    return 2 * (w @ ((p - mp) * (t - mt))) / (w @ (p - mp) ** 2 + w @ (t - mt) ** 2 + (mp - mt) ** 2)


# ---------------------------------------------------------------------------------------------------------- streaming
@given(points=st.lists(st.integers(1, 59), max_size=5), seed=st.integers(0, 100))
def test_pooled_equals_the_whole(points, seed):
    pred, target, mask = draw(seed)
    got = feed(StreamingCCC(), pred, target, mask, points).compute()
    expected = [numpy_ccc(pred[mask][:, c], target[mask][:, c]) for c in range(2)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("lead", [(), (3,)])
@given(points=st.lists(st.integers(1, 59), max_size=5))
def test_running_equals_its_definition(mode, lead, points):
    pred, target, mask = draw(lead=lead)
    got = feed(StreamingCCC(**mode), pred, target, mask, points).compute()
    assert got.shape == (*lead, 2)
    p, t, m = (x.double().numpy().reshape(-1, 60, *x.shape[len(lead) + 1 :]) for x in (pred, target, mask))
    age = np.arange(60)[::-1]
    w = 0.5 ** (age / mode["halflife"]) if "halflife" in mode else (age < mode["window"]).astype(float)
    expected = [[weighted_ccc(p[b, :, c], t[b, :, c], w * m[b]) for c in range(2)] for b in range(len(p))]
    np.testing.assert_allclose(got.numpy().reshape(-1, 2), expected, rtol=1e-6, atol=1e-7)


def test_updates_of_any_shape_pool():
    pred, target, mask = draw()
    metric = StreamingCCC()
    metric.update(pred[0], target[0], mask[0])
    metric.update(pred[1:], target[1:], mask[1:, :, None].expand(-1, -1, 2))
    metric.update(pred[:, :0], target[:, :0])
    torch.testing.assert_close(metric.compute(), functional.ccc(pred.double(), target.double(), mask))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_seen_is_zero_and_reset_forgets(mode):
    pred, target, mask = draw()
    metric = StreamingCCC(**mode)
    assert metric.compute().tolist() == [0.0, 0.0]
    first = metric(pred, target, mask)
    metric.reset()
    assert metric.compute().tolist() == [0.0, 0.0]
    metric.update(pred[:0], target[:0]) if metric.pooled else metric.update(pred[:, :0], target[:, :0])
    assert metric.compute().tolist() == [0.0, 0.0]
    assert torch.equal(metric(pred, target, mask), first)
    assert first.abs().min() > 0.1
    metric.reset()
    one = metric(pred[0], target[0], mask[0])  # another shape may follow a reset
    assert one.shape == (2,)


@given(cut=st.integers(1, 59), seed=st.integers(0, 100))
def test_merge_is_exact(cut, seed):
    pred, target, mask = draw(seed)
    a, b = StreamingCCC(), StreamingCCC()
    a.update(pred[:, :cut], target[:, :cut], mask[:, :cut])
    b.update(pred[:, cut:], target[:, cut:], mask[:, cut:])
    kept = b.moments.clone()
    a.merge(b)
    assert torch.equal(kept, b.moments)
    whole = StreamingCCC()
    whole.update(pred, target, mask)
    torch.testing.assert_close(a.moments, whole.moments, rtol=1e-12, atol=1e-12)
    empty = StreamingCCC()
    empty.merge(a)
    assert torch.equal(empty.moments, a.moments)


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_continues_the_stream(mode):
    pred, target, mask = draw()
    metric = StreamingCCC(**mode)
    metric.update(pred[:, :33], target[:, :33], mask[:, :33])
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    parent = torch.nn.ModuleDict({"score": StreamingCCC(**mode)})  # with a prefix, and a stale stream inside
    parent["score"].update(pred[:1], target[:1])
    parent.load_state_dict({f"score.{k}": v for k, v in torch.load(file, weights_only=True).items()})
    twins = (metric, parent["score"], copy.deepcopy(metric))
    for twin in twins:
        twin.update(pred[:, 33:], target[:, 33:], mask[:, 33:])
    assert all(torch.equal(twins[0].compute(), twin.compute()) for twin in twins[1:])


def test_state_stays_in_double_precision():
    for mode in MODES:
        metric = StreamingCCC(**mode)
        pred, target, mask = draw()
        metric.update(pred, target, mask)
        before = {k: v.clone() for k, v in metric.state_dict().items()}
        metric.half().float().to(torch.bfloat16)
        assert all(torch.equal(before[k], v) for k, v in metric.state_dict().items())


def test_half_precision_and_graphs_are_taken_as_values():
    pred, target, mask = draw()
    pred = pred.bfloat16().requires_grad_()
    got = StreamingCCC()(pred, target, mask)
    assert not got.requires_grad
    torch.testing.assert_close(got, StreamingCCC()(pred.detach().float(), target, mask))


def test_large_offsets_lose_nothing():
    """Sums of squares in float32 would be off by percents here."""
    g = torch.Generator().manual_seed(0)
    target = 1000 + torch.randn(5000, 2, generator=g)
    pred = target + 0.5 * torch.randn(5000, 2, generator=g)
    metric = StreamingCCC()
    for a in range(0, 5000, 500):
        metric.update(pred[a : a + 500], target[a : a + 500])
    np.testing.assert_allclose(metric.compute(), [numpy_ccc(pred[:, c], target[:, c]) for c in range(2)], rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, t: StreamingCCC(0), ValueError, "num_targets: expected an int >= 1"),
        (lambda p, t: StreamingCCC(window=1), ValueError, "window: expected an int >= 2"),
        (lambda p, t: StreamingCCC(window=9, halflife=3.0), ValueError, "window, halflife: expected at most one"),
        (
            lambda p, t: StreamingCCC(3).update(p, t),
            ValueError,
            r"pred: expected shape \(T, 3\) or \(B, T, 3\), got \(3, 60, 2\)",
        ),
        (lambda p, t: StreamingCCC().update(p.numpy(), t), TypeError, "pred: expected a torch.Tensor, got ndarray"),
        (lambda p, t: StreamingCCC().update(p, t[:, :5]), ValueError, "target"),
        (lambda p, t: StreamingCCC().update(p, t, torch.ones(3, 60)), TypeError, "mask"),
        (lambda p, t: StreamingCCC().merge(torch.zeros(2, 6)), TypeError, "other: expected a StreamingCCC, got Tensor"),
        (lambda p, t: StreamingCCC().merge(StreamingCCC(3)), ValueError, "num_targets=2, got 3"),
        (
            lambda p, t: StreamingCCC(window=5).merge(StreamingCCC(window=5)),
            ValueError,
            "other: expected both metrics pooled .*, got StreamingCCC",
        ),
        (
            lambda p, t: StreamingCCC().merge(StreamingCCC(halflife=5)),
            ValueError,
            "other: expected both metrics pooled .*, got StreamingCCC",
        ),
    ],
)
def test_errors_name_the_argument(call, error, match):
    pred, target, _ = draw()
    with pytest.raises(error, match=match):
        call(pred, target)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_running_stream_keeps_its_batch(mode):
    pred, target, _ = draw()
    metric = StreamingCCC(**mode)
    metric.update(pred, target)
    for other in (pred[:2], pred[0]):
        with pytest.raises(ValueError, match=r"pred: expected 3 sequences, \(B, T, C\), as this stream began"):
            metric.update(other, other)


# -------------------------------------------------------------------------------------------------------- torchmetrics
def test_importing_does_not_need_torchmetrics():
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "import sage_ext.metrics as m; m.StreamingCCC()\n"
        "try: m.TorchMetricsCCC\n"
        "except ImportError as e: assert 'sage-ext[metrics]' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    import sage_ext.metrics

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sage_ext.metrics.Nothing  # noqa: B018


torchmetrics = pytest.importorskip("torchmetrics")


def adapter(**options):
    from sage_ext.metrics import TorchMetricsCCC

    return TorchMetricsCCC(**options)


def test_adapter_is_a_metric_and_agrees_with_streaming():
    pred, target, mask = draw()
    ours, plain = adapter(), StreamingCCC()
    assert isinstance(ours, torchmetrics.Metric)
    for a in range(0, 60, 20):
        part = (pred[:, a : a + 20], target[:, a : a + 20], mask[:, a : a + 20])
        torch.testing.assert_close(
            ours(*part), functional.ccc(*(x.double() if x.is_floating_point() else x for x in part))
        )
        plain.update(*part)
    torch.testing.assert_close(ours.compute(), plain.compute(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter(average=True)(pred, target, mask), plain.compute().mean())


@pytest.mark.parametrize("frames", [50, 5000])
def test_adapter_agrees_with_torchmetrics_up_to_the_divisor(frames):
    """theirs = 2 cov / (var + var + gap^2) with cov and var over n - 1: same but for the gap's share, O(1/n)."""
    pred, target, _ = draw(lead=(), frames=frames)
    theirs = torchmetrics.ConcordanceCorrCoef(num_outputs=2)(pred, target).double()
    p, t = pred.double(), target.double()
    n, gap = frames, (p.mean(0) - t.mean(0)).square()
    spread = p.var(0, correction=0) + t.var(0, correction=0)
    ours = adapter()(pred, target)
    torch.testing.assert_close(ours * (spread + gap) / (spread + gap * (n - 1) / n), theirs, atol=2e-6, rtol=0)
    assert (ours - theirs).abs().max() < 1.0 / n


def test_adapter_gathers_as_torchmetrics_does():
    """Two processes, as torchmetrics joins them: states gathered, stacked, reduced by the state's own function."""
    pred, target, mask = draw()

    metrics = []
    for rank in range(3):
        metrics.append(adapter())
        metrics[rank].update(pred[rank], target[rank], mask[rank])
    local = [m.moments.clone() for m in metrics]
    metrics[0].sync(dist_sync_fn=lambda x, group=None: local, distributed_available=lambda: True)
    whole = functional.ccc_moments(pred, target, mask)
    torch.testing.assert_close(metrics[0].moments, whole, rtol=1e-12, atol=1e-12)
    metrics[0].unsync()
    assert torch.equal(metrics[0].moments, local[0])
    metrics[1].merge_state(metrics[2])
    both = functional.ccc_moments(pred[1:], target[1:], mask[1:])
    torch.testing.assert_close(metrics[1].moments, both, rtol=1e-12, atol=1e-12)


def test_adapter_in_a_collection_pickle_reset():
    pred, target, mask = draw()
    group = torchmetrics.MetricCollection({"all": adapter(), "mean": adapter(average=True)})
    group.update(pred, target, mask)
    values = group.compute()
    torch.testing.assert_close(values["all"].mean(), values["mean"])
    metric = adapter()
    metric.update(pred, target, mask)
    clone = pickle.loads(pickle.dumps(metric))
    assert torch.equal(clone.compute(), metric.compute())
    metric.reset()
    assert not metric.moments.any()
    assert metric.moments.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The variance of predictions")
def test_degenerates_are_zero_where_torchmetrics_gives_nan():
    constant = torch.full((10, 2), 0.5)
    assert adapter()(constant, constant).tolist() == [0.0, 0.0]
    assert all(math.isnan(v) for v in torchmetrics.ConcordanceCorrCoef(num_outputs=2)(constant, constant))


CASTS = {
    "to dtype": lambda m, d: m.to(d),
    "half": lambda m, d: m.half(),
    "bfloat16": lambda m, d: m.bfloat16(),
    "type": lambda m, d: m.type(d),
    "set_dtype": lambda m, d: [x.set_dtype(d) for x in m.modules() if isinstance(x, torchmetrics.Metric)],
    "device": lambda m, d: m.to("cpu"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", CASTS)
def test_adapter_survives_casts(cast, dtype):
    """Before, between and after updates, alone and inside a module: the state stays float64, the value exact."""
    pred, target, mask = draw()
    whole = functional.ccc(pred.double(), target.double(), mask)
    module = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "metric": adapter()})
    CASTS[cast](module, dtype)
    for row in range(3):
        module["metric"].update(pred[row : row + 1], target[row : row + 1], mask[row : row + 1])
        CASTS[cast](module, dtype)
    CASTS[cast](module["metric"], dtype)
    metric = module["metric"]
    assert metric.moments.dtype == metric._defaults["moments"].dtype == torch.float64
    torch.testing.assert_close(metric.compute(), whole, rtol=1e-12, atol=1e-12)
    metric.reset()
    assert metric.moments.dtype == torch.float64
    metric(pred.to(dtype), target.to(dtype), mask)
    assert 0.0 < abs(metric.compute()[0].item()) <= 1.0


def test_adapter_takes_one_target_as_torchmetrics_does():
    pred, target, _ = draw(lead=(), frames=4000)
    theirs = torchmetrics.ConcordanceCorrCoef()(pred[:, 0], target[:, 0])
    ours = adapter(num_targets=1)(pred[:, 0], target[:, 0])
    assert ours.shape == theirs.shape == ()
    torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=0)
    assert torch.equal(adapter(num_targets=1)(pred[:, :1], target[:, :1]), ours)
    with pytest.raises(ValueError, match=r"pred: expected shape \(T, 2\) or \(B, T, 2\), got \(4000,\)"):
        adapter()(pred[:, 0], target[:, 0])


def test_adapter_plots():
    pytest.importorskip("matplotlib").use("Agg")
    pred, target, mask = draw()
    metric = adapter()
    values = [metric(pred, target, mask), metric(target, pred, mask)]
    for figure, _ in (metric.plot(), metric.plot(values), adapter(average=True).plot(values[0].mean())):
        assert figure.axes


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_module_that_holds_the_adapter_can_be_scripted():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.metric = torch.nn.Linear(2, 2), adapter()

        def forward(self, x):
            return self.net(x)

    holder = Holder()
    x = torch.randn(3, 2)
    assert torch.equal(torch.jit.script(holder)(x), holder(x))
    torch.jit.script(adapter())
