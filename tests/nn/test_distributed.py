"""Losses, metrics and statistics of several processes against one process that holds the global batch.

One team of three processes serves all tests; those of two run on a group of its first two ranks. A function `on_*` runs on
every rank; batches are drawn from a seed, whole, by every process, which then takes its part.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch
from ranks import Team
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sage_ext import _distributed, functional
from sage_ext.metrics import StreamingCCC
from sage_ext.models import SAGE, SAGELoss, SAGEOutput
from sage_ext.nn import (
    CCCLoss,
    ExplainedVarianceNLL,
    FusionOutput,
    ReliabilityFusion,
    ReliabilityHead,
    ReliabilityNLL,
    TemporalCCCLoss,
    Typicality,
    convert_sync_statistics,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
SIZES = (2, 3)  # of groups


@pytest.fixture(scope="module")
def team():
    with Team(max(SIZES)) as team:
        team(on_start)
        yield team


def on_start(rank):
    assert dist.get_rank() == rank


groups: dict[int, dist.ProcessGroup] = {}  # of each process, made when first asked for: all ranks ask in the same order


def group_of(size: int) -> dist.ProcessGroup:
    if size not in groups:
        groups[size] = dist.group.WORLD if size == dist.get_world_size() else dist.new_group(list(range(size)))
    return groups[size]


# ---------------------------------------------------------------------------------------------------------- the batches
FRAMES, TARGETS = 23, 2
PARTS = {  # sequences a rank, of which the first `size` are used
    "even": (2, 2, 2),
    "uneven": (4, 1, 2),
    "first empty": (0, 3, 1),
    "second empty": (3, 0, 2),
    "all in one": (3, 0, 0),
}


def draw(seed, parts, mask="frame", dtype=torch.float64, offset=0.0):
    """[(pred, target, mask) a rank]"""
    g = torch.Generator().manual_seed(seed)
    shape = (sum(parts), FRAMES, TARGETS)
    target = torch.randn(*shape, generator=g, dtype=torch.float64)
    level = torch.randn(len(target), 1, TARGETS, generator=g, dtype=torch.float64)  # parts differ in mean
    pred = 0.7 * target + 0.5 * torch.randn(*shape, generator=g, dtype=torch.float64) + level
    valid = None
    if mask != "none":
        valid = torch.rand(*(shape if mask == "element" else shape[:2]), generator=g) > 0.3
    if mask == "a rank without":  # no valid frame on the first rank, one on the second
        valid[: parts[0] + parts[1]] = False
        valid[parts[0] : parts[0] + 1, 3] = True
    pred, target = ((x + offset).to(dtype) for x in (pred, target))
    return list(
        zip(pred.split(parts), target.split(parts), [None] * len(parts) if valid is None else valid.split(parts))
    )


def joined(batch):
    pred, target, mask = zip(*batch)
    return torch.cat(pred), torch.cat(target), None if mask[0] is None else torch.cat(mask)


def gradients(loss, pred, target, mask):
    """The loss, and its gradients by both."""
    pred, target = (x.detach().clone().requires_grad_() for x in (pred, target))
    value = loss(pred, target, mask)
    value.backward()
    return value.detach(), pred.grad, target.grad


def concordance(weights, group=None):
    """A loss of `functional.ccc` that tells its channels apart."""
    return lambda pred, target, mask: functional.ccc(pred, target, mask, process_group=group) @ weights.to(pred.dtype)


WEIGHTS = torch.tensor([1.0, -0.3])
LOSSES = {
    "ccc": lambda group=None: concordance(WEIGHTS, group),
    "CCCLoss": lambda group=None: CCCLoss(process_group=group),
    "weighted": lambda group=None: CCCLoss(channel_weights=[1, 3], process_group=group),
    "sequence": lambda group=None: CCCLoss(pool="sequence", process_group=group),
    "weighted sequence": lambda group=None: CCCLoss("sequence", channel_weights=[1, 3], process_group=group),
    "cumulative": lambda group=None: TemporalCCCLoss(process_group=group),
    "window": lambda group=None: TemporalCCCLoss(window=5, process_group=group),
    "halflife": lambda group=None: TemporalCCCLoss(halflife=4.0, process_group=group),
}


def on_loss(rank, size, name, batches):
    group = group_of(size)  # made by all ranks together
    if rank >= size:
        return None
    return [gradients(LOSSES[name](group), *batch[rank]) for batch in batches]


def check_loss(team, size, name, batches, rtol=1e-10):
    found = team(on_loss, size, name, batches)[:size]
    for i, batch in enumerate(batches):
        value, by_pred, by_target = gradients(LOSSES[name](), *joined(batch))
        for rank in range(size):
            torch.testing.assert_close(found[rank][i][0], value, rtol=rtol, atol=rtol)
            assert torch.equal(found[rank][i][0], found[0][i][0])  # to the bit
        for part, expected in ((1, by_pred), (2, by_target)):
            got = torch.cat([found[rank][i][part] for rank in range(size)]) / size
            torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
            if expected.any():
                cosine = torch.nn.functional.cosine_similarity(got.flatten().double(), expected.flatten().double(), 0)
                assert 1 - cosine < rtol


# ------------------------------------------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_global_batch(team, size, name):
    masks = ("none", "frame", "element", "a rank without")
    parts = [parts[:size] for parts in PARTS.values()]
    check_loss(team, size, name, [draw(11 * i + j, p, m) for i, p in enumerate(parts) for j, m in enumerate(masks)])


@pytest.mark.parametrize("size", SIZES)
def test_offsets_lose_nothing(team, size):
    """1e6 spreads away from zero the rounding of the inputs is 1e-10; moments not centred would keep four digits."""
    check_loss(team, size, "CCCLoss", [draw(5, PARTS["uneven"][:size], offset=1e6)], 1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_float32(team, size):
    check_loss(team, size, "CCCLoss", [draw(7, PARTS["uneven"][:size], dtype=torch.float32)], 2e-6)
    check_loss(team, size, "window", [draw(7, PARTS["uneven"][:size], dtype=torch.float32)], 2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ccc", "CCCLoss", "window"])
def test_undefined_is_as_in_one_process(team, size, name):
    """No valid frame anywhere; a single one; all constant and equal, whose merged spread has to be exactly 0."""
    nothing, one, constant = (draw(3, PARTS["uneven"][:size]) for _ in range(3))
    for batch in (nothing, one):
        for _, _, mask in batch:
            mask.zero_()
    one[1][2][0, 4] = True
    constant = [(torch.full_like(p, 0.1), torch.full_like(t, 0.1), m) for p, t, m in constant]
    check_loss(team, size, name, [nothing, one, constant])
    value, by_pred, _ = gradients(LOSSES[name](), *joined(constant))
    assert not by_pred.any()
    assert value == (0 if name == "ccc" else 1)


def test_ignored_frames(team):
    batch = draw(2, PARTS["uneven"], "frame")
    for _, target, _ in batch:
        target[:, ::3, 1] = -5.0
    value, by_pred, _ = gradients(CCCLoss(ignore_value=-5.0), *joined(batch))
    found = team(on_ignored, batch)
    torch.testing.assert_close(found[2][0], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g, _ in found]) / 3, by_pred, rtol=1e-10, atol=1e-14)


def on_ignored(rank, batch):
    return gradients(CCCLoss(ignore_value=-5.0, process_group=group_of(3)), *batch[rank])


def test_what_local_losses_miss(team):
    """The tests above are able to fail: the mean of local losses is another number with another gradient."""
    batch = draw(0, PARTS["even"])
    value, by_pred, _ = gradients(CCCLoss(), *joined(batch))
    local = [gradients(CCCLoss(), *part) for part in batch]
    assert abs(torch.stack([v for v, _, _ in local]).mean() - value) > 0.03
    cosine = torch.nn.functional.cosine_similarity(torch.cat([g for _, g, _ in local]).flatten(), by_pred.flatten(), 0)
    assert cosine < 0.95


# ------------------------------------------------------------------------------------- the losses of outputs with confidence
MODALITIES = ("audio", "visual")
DRAWS = ("none", "valid", "present", "both", "a rank without", "nothing", "one frame")


def draw_outputs(seed, parts, flags, joint=True, single=True):
    """(inputs, (labels, valid, present)), whole: raw numbers of which `sage_output` makes a SAGEOutput."""
    g = torch.Generator().manual_seed(seed)
    lead, experts = (sum(parts), FRAMES), len(MODALITIES) + joint

    def normal(*shape):
        return torch.randn(*lead, *shape, generator=g, dtype=torch.float64)

    level = torch.randn(lead[0], 1, TARGETS, generator=g, dtype=torch.float64)  # parts differ in mean
    labels = (normal(TARGETS) + level).tanh()
    follows = labels.unsqueeze(2)
    inputs = {
        "prediction": labels + 0.5 * normal(TARGETS),
        "unimodal": 0.5 * follows + 0.4 * normal(len(MODALITIES), TARGETS) + 0.2,
        "experts": torch.tensor([0.7, -0.4, 1.2])[:experts, None] * follows + 0.4 * normal(experts, TARGETS),
        "confidence": normal(experts),
    }
    if single:
        inputs |= {"frames": 0.3 * follows + normal(experts, TARGETS), "precision": normal(experts)}
    valid = torch.rand(lead, generator=g) > 0.3 if flags not in ("none", "present") else None
    present = torch.rand(*lead, 2, generator=g) > 0.3 if flags in ("present", "both", "a rank without") else None
    if flags == "a rank without":
        valid[: parts[0]] = False
        present[..., 1][: sum(parts[:2])] = False
    if flags in ("nothing", "one frame"):
        valid.zero_()
    if flags == "one frame":
        valid[-1, 4] = True
    return inputs, (labels, valid, present)


def sage_output(model_inputs):
    x = model_inputs
    confidence = x["confidence"].sigmoid()
    return SAGEOutput(
        x["prediction"].tanh(), x["unimodal"].tanh(), confidence[..., -2:], confidence[..., -2:], confidence, None,
        torch.zeros(2, dtype=torch.int64), x["experts"].tanh(), confidence, confidence,
        x["frames"].tanh() if "frames" in x else None, x.get("precision"),
    )  # fmt: skip


def errors_of(inputs, labels):
    return (inputs["experts"] - labels.unsqueeze(2)).square()


def sage_loss(group):
    return lambda inputs, *given: SAGELoss(process_group=group)(sage_output(inputs), *given)[0]


def head_loss(group):
    """With what the Linears and the fusion's confidence are told by."""
    torch.manual_seed(0)
    head = ReliabilityHead({"audio": 2, "visual": 2}, TARGETS, process_group=group, detach_features=False).double()
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()

    def loss(inputs, labels, valid, present):
        confidence = inputs["confidence"][..., -2:].sigmoid()
        out = FusionOutput(inputs["prediction"], confidence, confidence, confidence, None, torch.zeros(2).long())
        return head(list(inputs["unimodal"].unbind(2)), out, labels, valid, present)

    return loss


def score_loss(score):
    def loss(inputs, labels, valid, present):
        return score(inputs["confidence"].sigmoid(), errors_of(inputs, labels), valid)

    return loss


CONFIDENT = {
    "SAGELoss": sage_loss,
    "ReliabilityHead": head_loss,
    "ReliabilityNLL": lambda group: score_loss(ReliabilityNLL(0.4, process_group=group)),
    "ExplainedVarianceNLL": lambda group: score_loss(ExplainedVarianceNLL(process_group=group)),
}
COLLECTIVES = {"SAGELoss": 2, "ReliabilityHead": 1, "ReliabilityNLL": 1, "ExplainedVarianceNLL": 1}


def input_gradients(loss, inputs, given):
    inputs = {k: x.detach().clone().requires_grad_() for k, x in inputs.items()}
    value = loss(inputs, *given)
    value.backward()
    return value.detach(), {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in inputs.items()}


@contextlib.contextmanager
def collectives():
    """The list of what is called of torch.distributed in the block."""
    called, before = [], {}
    for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "all_gather_object"):
        before[name] = getattr(dist, name)
        setattr(dist, name, lambda *a, _name=name, **k: (called.append(_name), before[_name](*a, **k))[1])
    try:
        yield called
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def on_confident(rank, size, name, batches):
    group = group_of(size)
    if rank >= size:
        return None
    loss = CONFIDENT[name](group)
    with collectives() as called:
        found = [input_gradients(loss, *part_of(batch, parts, rank)) for batch, parts in batches]
    assert called == ["all_gather"] * COLLECTIVES[name] * len(batches)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIDENT)
def test_a_loss_of_confidence_is_that_of_the_global_batch(team, size, name):
    batches = []
    for i, parts in enumerate(PARTS.values()):
        for j, flags in enumerate(DRAWS):
            batches.append((draw_outputs(17 * i + j, parts[:size], flags), parts[:size]))
    for joint, single in ((False, True), (True, False)):
        batches.append((draw_outputs(99, PARTS["uneven"][:size], "both", joint, single), PARTS["uneven"][:size]))
    found = team(on_confident, size, name, batches)[:size]
    for i, (batch, _) in enumerate(batches):
        value, expected = input_gradients(CONFIDENT[name](None), *batch)
        for rank in range(size):
            torch.testing.assert_close(found[rank][i][0], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(found[rank][i][0], found[0][i][0])  # to the bit
        for key, gradient in expected.items():
            got = torch.cat([found[rank][i][1][key] for rank in range(size)]) / size
            torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-10 * gradient.abs().max().item())


@pytest.mark.parametrize("name", CONFIDENT)
def test_what_local_losses_of_confidence_miss(name):
    """The test above is able to fail. (A mean over equally many frames is no worse.)"""
    parts = PARTS["uneven"]
    batch = draw_outputs(0, parts, "a rank without")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, _ = input_gradients(CONFIDENT[name](None), *batch)
        local = [input_gradients(CONFIDENT[name](None), *part_of(batch, parts, rank))[0] for rank in range(3)]
    assert abs(torch.stack(local).mean() - value) > 1e-3


COMPILED = {"SAGELoss": True, "ReliabilityHead": False}  # under autocast or not


def on_compiled(rank, batch, outputs, parts):
    step = torch.compile(CCCLoss(process_group=group_of(3)), fullgraph=True, backend="aot_eager")
    found = [gradients(step, *batch[rank])]
    for name, autocast in COMPILED.items():
        step = torch.compile(CONFIDENT[name](group_of(3)), fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(input_gradients(step, *part_of(outputs, parts, rank)))
    return found


@pytest.mark.slow
def test_one_graph_under_compile(team):
    """And the same under autocast, which leaves float64 alone."""
    batch, parts = draw(4, PARTS["uneven"]), PARTS["uneven"]
    outputs = draw_outputs(4, parts, "both")
    value, by_pred, by_target = gradients(CCCLoss(), *joined(batch))
    found = team(on_compiled, batch, outputs, parts)
    for rank in range(3):
        torch.testing.assert_close(found[rank][0][0], value, rtol=1e-12, atol=0)
    for part, expected in ((1, by_pred), (2, by_target)):
        got = torch.cat([f[0][part] for f in found]) / 3
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    for i, name in enumerate(COMPILED, 1):
        value, expected = input_gradients(CONFIDENT[name](None), *outputs)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[0][i][0], value, rtol=1e-12, atol=0)
            got = torch.cat([f[i][1][key] for f in found]) / 3
            torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------- the warning
def on_warning(rank):
    said = []
    pred, target, mask = draw(rank, (2,))[0]
    for loss in (
        CCCLoss(process_group=group_of(3)), CCCLoss(pool="sequence"), CCCLoss(), CCCLoss(), CCCLoss(ignore_value=-5.0)
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(pred, target, mask)
        said.append([(str(w.message), w.filename) for w in caught])
    batch = draw_outputs(0, (2,), "both")
    for whole in (False, False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if whole:  # whoever has the rows of all ranks has the global batch
                _distributed._warned.clear()
                _distributed.losses_are_whole()
            for make in CONFIDENT.values():
                make(None)(batch[0], *batch[1])
        said.append([str(w.message) for w in caught])
    _distributed._whole = False
    return said


def test_losses_apart_are_said_once(team):
    for with_group, sequences, first, *later, sage, again, whole in team(on_warning):
        [message] = sage  # the others are means over frames: right where ranks count equally many
        assert message.startswith("SAGELoss was given no process_group, so each of the 3 processes takes")
        assert again == whole == []
        assert with_group == sequences == []
        [(message, file)] = first
        assert file == __file__
        assert message.startswith("CCCLoss was given no process_group, so each of the 3 processes takes")
        assert message.count(". ") == 0  # one sentence
        assert later == [[], []]


def test_one_process_is_not_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CCCLoss()(*draw(0, (2,))[0])


# ------------------------------------------------------------------------------------------------- DistributedDataParallel
DIMS = {"audio": 5, "visual": 7}
STEPS = 20


class Estimator(nn.Module):
    """Fusion with quality, and a linear layer: what the README has its reader build."""

    def __init__(self):
        super().__init__()
        self.fuse = ReliabilityFusion(DIMS, 6, evidence_dim=8, stages=3, quality_dims={"visual": 2})
        self.out = nn.Linear(6, TARGETS)

    def forward(self, features, present, quality):
        return self.out(self.fuse(features, present, quality=quality).fused)


class WithHead(Estimator):
    """The same, and its loss inside: what the README adds to teach confidence."""

    def __init__(self, group):
        super().__init__()
        self.head = ReliabilityHead(self.fuse, TARGETS, kappa=1.0, process_group=group)

    def forward(self, features, present, quality, target, mask):
        out = self.fuse(features, present, quality=quality)
        return self.out(out.fused), self.head(features, out, target, mask, present)


def estimator(name, group=None):
    torch.manual_seed(0)
    if name == "SAGELoss":
        model = SAGE(
            DIMS,
            dim=6,
            stages=3,
            num_targets=TARGETS,
            blocks=2,
            evidence_dim=8,
            dropout=0.0,
            quality_dims={"visual": 2},
        )
    else:
        model = WithHead(group) if name == "ReliabilityHead" else Estimator()
    return model.double().train()


def step_loss(name, group=None):
    """Loss of a model and a batch."""
    if name == "SAGELoss":
        loss = SAGELoss(process_group=group)

        def of(model, inputs, outputs):
            features, present, quality = inputs
            return loss(model(features, present, quality=quality), *outputs, present)[0]

    elif name == "ReliabilityHead":
        loss = CCCLoss(process_group=group)

        def of(model, inputs, outputs):
            prediction, confident = model(*inputs, *outputs)
            return loss(prediction, *outputs) + confident

    else:
        loss = LOSSES[name](group)

        def of(model, inputs, outputs):
            return loss(model(*inputs), *outputs)

    return of


def training_batch(step, parts):
    """(features, present, quality), (target, mask), whole; sizes of the parts turn with the steps."""
    g = torch.Generator().manual_seed(100 + step)
    lead = (sum(parts), FRAMES)
    target = torch.randn(*lead, TARGETS, generator=g, dtype=torch.float64)
    features = {
        name: torch.randn(*lead, d, generator=g, dtype=torch.float64) + target.repeat(1, 1, d)[..., :d]
        for name, d in DIMS.items()
    }
    present = torch.rand(*lead, 2, generator=g) > 0.2
    quality = torch.randn(*lead, 2, generator=g, dtype=torch.float64)
    quality[..., 0][torch.rand(*lead, generator=g) > 0.5] = math.nan
    mask = torch.rand(*lead, generator=g) > 0.2
    if step % 5 == 1:
        mask[: parts[0]] = False
    return (features, present, {"visual": quality}), (target, mask)


def part_of(batch, parts, rank):
    """The rows of one rank, through any nesting."""
    if batch is None:
        return None
    if isinstance(batch, dict):
        return {k: part_of(v, parts, rank) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return tuple(part_of(v, parts, rank) for v in batch)
    return batch.split(parts)[rank]


def parts_at(step, size):
    return [*PARTS.values()][step % len(PARTS)][:size]


def sgd(model, loss, batches):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for inputs, outputs in batches:
        optimiser.zero_grad()
        value = loss(model, inputs, outputs)
        value.backward()
        optimiser.step()
        values.append(value.detach())
    return torch.stack(values)


def on_training(rank, size, name, together):
    group = group_of(size)
    if rank >= size:
        return None
    model = estimator(name, group if together else None)
    if together:
        convert_sync_statistics(model, group)
    wrapped = DistributedDataParallel(model, process_group=group)
    steps = [(training_batch(s, parts_at(s, size)), parts_at(s, size)) for s in range(STEPS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = step_loss(name, group if together else None)
        values = sgd(wrapped, loss, [part_of(batch, parts, rank) for batch, parts in steps])
    return values, model.state_dict()


def one_process(size, name):
    model = estimator(name)
    values = sgd(model, step_loss(name), [training_batch(s, parts_at(s, size)) for s in range(STEPS)])
    return values, model.state_dict()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["CCCLoss", "sequence", "halflife", "SAGELoss", "ReliabilityHead"])
def test_ddp_trains_as_one_process(team, size, name):
    values, expected = one_process(size, name)
    start = estimator(name).state_dict()
    assert values[-1] < values[0] - 0.05  # something was learnt
    assert max((expected[k].double() - start[k].double()).abs().max() for k in expected) > 0.1
    found = team(on_training, size, name, True)[:size]
    for got_values, got in found:
        torch.testing.assert_close(got_values, values, rtol=1e-10, atol=1e-10)
        for key, x in expected.items():
            torch.testing.assert_close(got[key], x, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
            assert torch.equal(got[key], found[0][1][key]), key


def test_without_it_ddp_trains_something_else(team):
    """The test above is able to fail."""
    _, expected = one_process(3, "CCCLoss")
    first, *others = (state for _, state in team(on_training, 3, "CCCLoss", False))
    assert (first["out.weight"] - expected["out.weight"]).abs().max() > 1e-3
    for buffer in ("fuse.typicality.mean", "fuse.quality.mean"):
        assert (first[buffer] - expected[buffer]).abs().max() > 1e-3, buffer
        assert all((first[buffer] - other[buffer]).abs().max() > 1e-3 for other in others), buffer


# ------------------------------------------------------------------------------------------------------------- statistics
def on_statistics(rank, size, steps):
    group = group_of(size)
    if rank >= size:
        return None
    module = convert_sync_statistics(Typicality(2, dims=(3, 4)).double(), group)
    states = []
    for parts, x, known in steps:
        module([v.split(parts)[rank] for v in x], known.split(parts)[rank], None)
        states.append({k: v.clone() for k, v in module.state_dict().items()})
    module.eval()
    if rank == 0:  # who does not train asks nobody
        module(steps[0][1], steps[0][2], None)
    return states


@pytest.mark.parametrize("size", SIZES)
def test_statistics_follow_the_global_batch(team, size):
    g = torch.Generator().manual_seed(1)
    steps = []
    for step in range(12):
        parts = parts_at(step, size)
        lead = (sum(parts), FRAMES)
        x = [3.0 * step + torch.randn(*lead, d, generator=g, dtype=torch.float64) * (step + 1) for d in (3, 4)]
        known = torch.rand(*lead, 2, generator=g) > 0.4
        if step == 4:
            known[..., 1] = False  # nobody has the second modality
        if step == 6:
            known[: parts[0]] = False  # the first rank has nothing
        steps.append((parts, [torch.where(known[..., m, None], v, 0.0) for m, v in enumerate(x)], known))
    alone = Typicality(2, dims=(3, 4)).double()
    found = team(on_statistics, size, steps)[:size]
    for step, (_, x, known) in enumerate(steps):
        alone(x, known, None)
        for rank in range(size):
            for key, expected in alone.state_dict().items():
                torch.testing.assert_close(found[rank][step][key], expected, rtol=1e-12, atol=1e-12)
                assert torch.equal(found[rank][step][key], found[0][step][key])
    assert alone.updates.tolist() == [[12] * 3, [11] * 3]


def test_conversion():
    """It returns the module, converts what is inside, and without a group nothing changes, to the bit."""
    torch.manual_seed(0)
    plain = ReliabilityFusion(DIMS, 6, quality_dims={"visual": 2})
    converted = copy.deepcopy(plain)
    assert convert_sync_statistics(converted) is converted
    assert [m.synchronised for m in (converted.typicality, converted.quality, plain.typicality)] == [True, True, False]
    converted = pickle.loads(pickle.dumps(converted))
    features = {name: torch.randn(2, 30, d) for name, d in DIMS.items()}
    for module in (plain, converted):
        for _ in range(3):
            module(features, quality={"visual": torch.ones(2, 30, 2)})
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), converted.state_dict().values()))
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got int"):
        convert_sync_statistics(3)
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup .* got str"):
        convert_sync_statistics(plain, "world")


# ----------------------------------------------------------------------------------------------------------- StreamingCCC
def on_metric(rank, size, batch):
    group = group_of(size)
    if rank >= size:
        return None
    metric, found = StreamingCCC(), []
    for first in (0, 10):
        metric.update(*(x[:, first : first + 10] for x in batch[rank]))
        own = metric.moments.clone()
        found.append(metric.sync(group).moments)
        found.append(metric.sync(group if size < 3 else None).moments)  # asked twice; three are the default group
        assert torch.equal(metric.moments, own)
    return found, metric.sync(group).compute()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parts", PARTS)
def test_metrics_sync_to_the_whole(team, size, parts):
    batch = draw(9, PARTS[parts][:size], dtype=torch.float32)
    found = team(on_metric, size, batch)[:size]
    pred, target, mask = joined(batch)
    for frames, i in ((10, 0), (10, 1), (20, 2), (20, 3)):
        whole = functional.ccc_moments(pred[:, :frames], target[:, :frames], mask[:, :frames])
        for moments, _ in found:
            torch.testing.assert_close(moments[i], whole, rtol=1e-12, atol=1e-12)
            assert torch.equal(moments[i], found[0][0][i])
    torch.testing.assert_close(found[-1][1], functional.ccc_from_moments(whole), rtol=1e-12, atol=1e-12)


def on_torchmetrics(rank, batch):
    from sage_ext.metrics import TorchMetricsCCC

    metric = TorchMetricsCCC()
    metric.update(*batch[rank])
    each_step = TorchMetricsCCC(dist_sync_on_step=True)
    return [metric.compute(), each_step(*batch[rank]), each_step.compute()]


@pytest.mark.slow  # every rank imports torchmetrics
def test_the_torchmetrics_adapter_does_so_by_itself(team):
    pytest.importorskip("torchmetrics")
    batch = draw(9, PARTS["second empty"])
    expected = functional.ccc(*joined(batch))
    for values in team(on_torchmetrics, batch):
        for got in values:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_metric_without_a_group_is_copied():
    metric = StreamingCCC()
    metric.update(*draw(0, (2,))[0])
    whole = metric.sync()
    assert torch.equal(whole.moments, metric.moments)
    whole.reset()
    assert metric.moments.any()
    for options in ({"window": 5}, {"halflife": 3.0}):
        with pytest.raises(ValueError, match=r"sync: expected a pooled metric .*, got StreamingCCC\(num_targets=2"):
            StreamingCCC(**options).sync()


# ---------------------------------------------------------------------------------------------------------------- errors
def on_errors(rank):
    group, pred = group_of(3), torch.zeros(2, 5, 2)
    with pytest.raises(ValueError, match=r"process_group: expected None with pool='sequence' .* got ProcessGroup"):
        functional.ccc(pred, pred, pool="sequence", process_group=group)
    others = dist.new_group([0])
    if rank:
        with pytest.raises(TypeError, match=r"process_group: expected a .*ProcessGroup that this process belongs to"):
            CCCLoss(process_group=others)


def test_errors_of_groups(team):
    team(on_errors)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.ccc(torch.zeros(5, 2), torch.zeros(5, 2), process_group=3),
        lambda: CCCLoss(process_group=3),
        lambda: TemporalCCCLoss(process_group=3),
        lambda: ReliabilityNLL(process_group=3),
        lambda: ExplainedVarianceNLL(process_group=3),
        lambda: ReliabilityHead(DIMS, process_group=3),
        lambda: SAGELoss(process_group=3),
        lambda: StreamingCCC().sync(3),
    ],
)
def test_errors_of_what_is_no_group(call):
    with pytest.raises(
        TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup .*, or None, got int"
    ):
        call()
