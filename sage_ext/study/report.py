"""Tables and pictures of a comparison, from what was measured; nothing is evaluated again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..data.targets import Targets
from ..files import write_atomic
from ..models import FUSIONS
from ..report import (
    BLUE,
    DASH,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Picture,
    Table,
    new_figure,
    styled,
    write_report,
)
from .controls import CONTROLS, PERMUTED
from .corruptions import CORRUPTIONS, PROTOCOL
from .methods import (
    ALONE,
    CAUSAL,
    CEILINGS,
    HALVES,
    ORACLE,
    REFERENCE,
    TOLD,
    UNTRAINED,
    VARIANTS,
    WITH_QUALITY,
    half,
    title,
)
from .plan import CLEAN, HELD_OUT
from .results import Results, calibration_error, control_name
from .score import BINS, LOST
from .statistics import adjusted_mutual_information, interval, pooled_score, resampled

ALL = "all corruptions"
DEAD = ("dead-zeroed", "dead-frozen", "dead-saturated", "dead-noise")
WEAKENED = ("noise", "misaligned", "gain", "drift", "stage-noise")  # the frames hit still tell something
TOP = {ORACLE: "-", CAUSAL: DASH[1], TOLD: DASH[2]}  # dashes of the ceilings
COLORS = (VERMILLION, GREEN, PURPLE, ORANGE, SKY)

Group = list[list[int]]  # a score is the mean over these lists of the mean over the conditions in each


@dataclasses.dataclass(frozen=True)
class Scores:
    """P of every method, measured and resampled; `N` seeds, `K` conditions, `R` draws. Of one half of a comparison."""

    results: Results
    measured: dict[str, np.ndarray]  # method, or control of SAGE -> (N, K)
    drawn: dict[str, np.ndarray]  # the same -> (R, K), mean over the seeds drawn
    groups: dict[str, Group]
    half: str = ""  # one of `methods.HALVES`

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return REFERENCE + self.half

    @property
    def methods(self) -> list[str]:
        """Those of this half, and after them the ceilings, which are of both."""
        rest = [m for m in self.results.methods if m not in CEILINGS and half(m) == self.half]
        return rest + [m for m in CEILINGS if m in self.results.methods]

    @property
    def confidence(self) -> dict[tuple[int, int], dict[str, np.ndarray]]:
        """What was measured of the reference's, by (fit, condition); empty without it."""
        return self.results.confidence.get(self.reference, {})

    def halves(self) -> list[Scores]:
        """One a half in which anything was trained."""
        there = {half(m) for m in self.results.methods if m not in CEILINGS} or {""}
        return [dataclasses.replace(self, half=name) for name in HALVES if name in there]

    def mean(self, method: str, group: Group) -> float:
        return float(_grouped(self.measured[method].mean(0), group))

    def spread(self, method: str, group: Group) -> float:
        """Standard deviation over seeds; NaN for a single one."""
        values = _grouped(self.measured[method], group)
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def difference(self, ours: str, theirs: str, group: Group) -> tuple[float, float, float]:
        """P of `ours` less that of `theirs`, and its 95 % interval."""
        drawn = _grouped(self.drawn[ours] - self.drawn[theirs], group)
        return (self.mean(ours, group) - self.mean(theirs, group), *interval(drawn))

    def peers(self) -> list[str]:
        """Other people's methods, by their definitions."""
        return [m for m in self.methods if m.removesuffix(self.half) in FUSIONS]

    def sharing(self) -> list[str]:
        """Other fusions, uniform weights among them, in a model that has SAGE's memory and stuck rule."""
        plain = {m: m.removesuffix(self.half) for m in self.methods}
        return [m for m, name in plain.items() if name in VARIANTS and name.partition("-")[0] != REFERENCE]

    def best(self, methods: Sequence[str], group: Group) -> str:
        return max(methods, key=lambda method: self.mean(method, group))


def _grouped(values: np.ndarray, group: Group) -> np.ndarray:
    """(..., K) -> (...)."""
    return np.mean([values[..., index].mean(-1) for index in group], 0)


def score(results: Results, draws: int = 2000) -> Scores:
    """Bootstrap over groups of videos and seeds at once: a draw takes as many groups and as many seeds as there are, each
    with replacement, the same for all methods and conditions, and pools the frames of the videos anew."""
    rng = np.random.default_rng(0)
    weights = resampled(results.groups, draws, rng)  # (R, V)
    seeds = results.study.seeds
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (R, N)
    measured, drawn = {}, {}
    for method, moments in results.moments.items():
        by_video = np.moveaxis(moments, 2, 0)  # (V, N, K, C, 6)
        measured[method] = pooled_score(by_video, np.ones((1, len(by_video))))[0]
        out = np.empty((draws, moments.shape[1]))
        for k in range(moments.shape[1]):
            out[:, k] = (pooled_score(by_video[:, :, k], weights) * seed_weights).sum(1)
        drawn[method] = out
    kinds: dict[str, list[int]] = {}
    for k, condition in enumerate(results.conditions):
        if condition is not None:
            kinds.setdefault(condition.corruption, []).append(k)
    groups: dict[str, Group] = {CLEAN: [[0]]}
    if kinds:
        groups[ALL] = list(kinds.values())
    groups.update({kind: [index] for kind, index in kinds.items()})
    return Scores(results, measured, drawn, groups)


# -------------------------------------------------------------------------------------------------------------- tables
def _number(value: float, signed: bool = False) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f}" if signed else f"{value:.3f}"


def _with_spread(value: float, spread: float) -> str:
    return _number(value) + ("" if np.isnan(value) or np.isnan(spread) else f" ± {spread:.3f}")


def _with_interval(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _ranked(scores: Scores) -> list[str]:
    """Best first by the mean over all corruptions, the ceilings last."""
    group = scores.groups.get(ALL, scores.groups[CLEAN])
    rest = [m for m in scores.methods if m not in CEILINGS]
    order = sorted(rest, key=lambda method: -scores.mean(method, group))
    return order + [m for m in scores.methods if m in CEILINGS]


def tables(scores: Scores) -> list[Table]:
    """Of each half those that its methods can fill."""
    found = []
    for part in scores.halves():
        made = [_overview(part), *_by_fold(part), *_claims(part), *_by_corruption(part), *_by_severity(part),
                *_against_peer(part), *_controls(part), *_calibration(part), *_stages(part)]  # fmt: skip
        found += [dataclasses.replace(table, title=table.title + _of_half(part)) for table in made]
    return found


def _of_half(scores: Scores) -> str:
    """Ends the title of what is about the second half."""
    return f", {HALVES[scores.half]}" if scores.half else ""


def _overview(scores: Scores) -> Table:
    results, paired = scores.results, scores.reference in scores.methods
    shown = {name: group for name, group in scores.groups.items() if name in (CLEAN, ALL)}
    header = ["", "parameters", "rate", *(f"P {name}" for name in shown)]
    header += [f"SAGE less this, {name}" for name in shown] if paired else []
    rows = []
    for method in _ranked(scores):
        trained = results.trained.results.get((method, results.parts[0], 0))
        row = [title(method), "-" if trained is None else f"{trained['parameters']:,}"]
        rates = sorted({rate for (name, _), rate in results.trained.rates.items() if name == method})
        row.append(" to ".join(dict.fromkeys((f"{rates[0]:g}", f"{rates[-1]:g}"))) if rates else "-")
        row += [_with_spread(scores.mean(method, g), scores.spread(method, g)) for g in shown.values()]
        if paired:
            ours = scores.reference
            row += [
                "" if method == ours else _with_interval(*scores.difference(ours, method, g)) for g in shown.values()
            ]
        rows.append(row)
    study = results.study
    note = (
        f"P = {_meaning(results.targets)} over {results.frames:,} frames of {len(results.clips)} clips taken together; mean ± "
        f"standard deviation over {_seeds(study.seeds)}. All corruptions: the mean over the kinds of the mean over each "
        "kind's modalities and severities. In brackets: 95 % intervals of the bootstrap over "
        f"{_drawn(results)} and seeds. The rate is the one of the grid with the best validation P."
    )
    if study.seeds == 1:
        note += " With one seed the intervals tell nothing of how much another seed would change."
    return Table("Methods", header, rows, note)


def _meaning(targets: Targets) -> str:
    """Of P."""
    if len(targets) == 1:
        return targets[0].score
    if len(targets) > 3:
        return f"the mean CCC of the {len(targets)} targets"
    return f"({' + '.join(target.score for target in targets)}) / {len(targets)}"


def _drawn(results: Results) -> str:
    """What the bootstrap draws."""
    return f"the {len(set(results.groups))} groups of videos" if results.study.folds is not None else "videos"


def _by_fold(scores: Scores) -> list[Table]:
    """P of each fold by itself, clean, mean over seeds; and its mean and spread."""
    results = scores.results
    if results.study.folds is None:
        return []
    folds, names = np.array(results.folds), [part.name for part in results.parts]
    rows = []
    for method in _ranked(scores):
        moments = np.moveaxis(results.moments[method][:, 0], 1, 0)  # (V, N, C, 6), clean
        each = np.array(
            [pooled_score(moments[folds == name], np.ones((1, int((folds == name).sum()))))[0].mean() for name in names]
        )
        rows.append([title(method), f"{each.mean():.3f} ± {np.std(each, ddof=1):.3f}", *map(float, each)])
    note = (
        "P of each fold's frames by themselves, clean, mean over seeds: the mean ± the standard deviation over folds. The "
        "CCC of a fold is not that of all frames together, which the other tables give: the folds' means differ."
    )
    return [Table("By fold", ("", "mean", *names), rows, note)]


def _by_corruption(scores: Scores) -> list[Table]:
    kinds = [name for name in scores.groups if name not in (CLEAN, ALL)]
    if not kinds:
        return []
    rows = [[title(m), *(_number(scores.mean(m, scores.groups[k])) for k in kinds)] for m in _ranked(scores)]
    note = "P, mean over seeds, severities and the modalities that fail."
    if any(name in scores.methods for name in UNTRAINED):
        note += (
            " The oracle and the causal filter take a spoilt modality as absent; blank where, in one of the kind's "
            f"conditions, that leaves nothing in over {LOST:.0%} of the frames. They are no upper line for "
            f"{', '.join(WEAKENED)}: there the frames still tell something."
        )
    return [Table("By corruption", ("", *kinds), rows, note)]


def _by_severity(scores: Scores) -> list[Table]:
    conditions = scores.results.conditions
    severities = [
        s for s in scores.results.study.severities if any(c is not None and c.severity == s for c in conditions)
    ]
    if len(severities) < 2:
        return []

    def at(severity: int) -> Group:
        found = [
            [k for k in index if (c := conditions[k]) is not None and c.severity == severity]
            for index in scores.groups[ALL]
        ]
        return [index for index in found if index]

    rows = [
        [title(m), *(_number(scores.mean(m, g)) for g in [scores.groups[CLEAN], *map(at, severities)])]
        for m in _ranked(scores)
        if m not in UNTRAINED
    ]
    return [Table("By severity", ("", "clean", *map(str, severities)), rows, "P, mean over seeds and corruptions.")]


def _against_peer(scores: Scores) -> list[Table]:
    peers = scores.peers()
    if scores.reference not in scores.methods or not peers:
        return []
    rows = []
    for name, group in scores.groups.items():
        best = scores.best(peers, group)
        ahead = sum(
            _grouped(scores.measured[scores.reference][n], group) > _grouped(scores.measured[best][n], group)
            for n in range(scores.results.study.seeds)
        )
        said = _with_interval(*scores.difference(scores.reference, best, group))
        rows.append([name, title(best), said, f"{ahead} of {scores.results.study.seeds}"])
    note = "The best peer is the best one on these very scores, row by row: the comparison favours it."
    return [Table("SAGE against the best peer", ("", "best peer", "SAGE less the peer", "seeds ahead"), rows, note)]


# -------------------------------------------------------------------------------------------------------------- claims
def _whole_clip(scores: Scores, kinds: Sequence[str]) -> Group:
    """Conditions in which one modality fails for the whole clip, a list a kind."""
    found = [
        [
            k
            for k, c in enumerate(scores.results.conditions)
            if c is not None and c.corruption == kind and len(c.modalities) == 1
            and CORRUPTIONS[kind].levels[c.severity - 1] == 1
        ]
        for kind in kinds
    ]  # fmt: skip
    return [index for index in found if index]


def _survivor(scores: Scores) -> str | None:
    """Adds to `scores` the method "survivor": in each condition the best single modality that did not fail."""
    results = scores.results
    alone = {m: name for m in results.modalities if (name := m + ALONE + scores.half) in results.methods}
    if len(alone) < len(results.modalities) or len(alone) < 2:
        return None
    for values in (scores.measured, scores.drawn):
        values["survivor"] = np.full_like(values[next(iter(alone.values()))], np.nan)
    for k, condition in enumerate(results.conditions):
        sound = [name for m, name in alone.items() if condition is not None and m not in condition.modalities]
        if sound:
            best = max(sound, key=lambda name: scores.measured[name][:, k].mean())
            for values in (scores.measured, scores.drawn):
                values["survivor"][:, k] = values[best][:, k]
    return "survivor"


class _Claims:
    """The rows of the table of claims: what was measured, its target, and whether it was met."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.rows = scores, list[tuple[str, str, str, str]]()

    def say(self, claim: str, measured: str, target: str, met: bool | None) -> None:
        self.rows.append((claim, measured, target, "" if met is None else "met" if met else "missed"))

    def less(
        self, theirs: str, group: Group, claim: str, least: float | None, *, sure: bool = False, words: str = ""
    ) -> None:
        """SAGE less another: `least` is the target (None: it is stated), `sure`: the interval must be above 0 too."""
        found = self.scores.difference(self.scores.reference, theirs, group)
        self.between(found, claim, least, sure=sure, words=words)

    def between(
        self, found: tuple[float, float, float], claim: str, least: float | None, *, sure: bool = False, words: str = ""
    ) -> None:
        """A difference with its interval."""
        target = words or ("stated" if least is None else f">= {least:+g}" + (", interval above 0" if sure else ""))
        met = None if least is None else bool(found[0] >= least and (found[1] > 0 or not sure))
        self.say(claim, _with_interval(*found), target, met)

    def at_most(self, value: float, claim: str, most: float) -> None:
        self.say(claim, _number(value), f"<= {most:g}", None if np.isnan(value) else bool(value <= most))

    def at_least(self, values: np.ndarray, claim: str, least: float) -> None:
        """The mean over seeds, and its spread."""
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        self.say(claim, _with_spread(float(np.mean(values)), spread), f">= {least:g}", bool(np.mean(values) >= least))


def _claims(scores: Scores) -> list[Table]:
    """The targets of the study, those that these conditions and methods can answer."""
    if scores.reference not in scores.methods:
        return []
    claims = _Claims(scores)
    _claims_on_peers(claims)
    _claims_on_parts(claims)
    _claims_on_failures(claims)
    _claims_on_confidence(claims)
    note = (
        f"Differences in P with 95 % intervals of the bootstrap over {_drawn(scores.results)} and seeds; "
        f"{_seeds(scores.results.study.seeds)}."
    )
    return [Table("Claims", ("", "measured", "target", ""), claims.rows, note)]


def _kinds(scores: Scores) -> dict[str, Group]:
    """The groups of one kind of corruption each."""
    return {name: group for name, group in scores.groups.items() if name not in (CLEAN, ALL)}


def _everywhere(scores: Scores, kind: str) -> Group:
    """The conditions in which a kind hits all modalities at once."""
    count = len(scores.results.modalities)
    found = [
        k for k, c in enumerate(scores.results.conditions) if c and c.corruption == kind and len(c.modalities) == count
    ]
    return [found] if found else []


def _claims_on_peers(claims: _Claims) -> None:
    scores = claims.scores
    peers, clean, corrupted = scores.peers(), scores.groups[CLEAN], scores.groups.get(ALL)
    if peers:
        best = scores.best(peers, clean)
        claims.less(best, clean, f"SAGE less the best peer ({title(best)}), clean", 0.012, sure=True)
    if peers and corrupted:
        best = scores.best(peers, corrupted)
        claims.less(best, corrupted, f"SAGE less the best peer ({title(best)}), all corruptions", 0.04, sure=True)
        against = {k: scores.difference(scores.reference, scores.best(peers, g), g) for k, g in _kinds(scores).items()}
        ahead, whole = sum(found[0] > 0 for found in against.values()), len(against) == len(PROTOCOL)
        wanted = 12 if scores.half == WITH_QUALITY else 10
        claims.say(
            "kinds of corruption in which SAGE is above the best peer of each",
            f"{ahead} of {len(against)}",
            f">= {wanted} of {len(PROTOCOL)}",
            bool(ahead >= wanted) if whole else None,
        )
        worst = min(against, key=lambda kind: against[kind][0])
        least = -0.005 if scores.half == WITH_QUALITY else None
        claims.between(against[worst], f"the worst of these differences ({worst})", least)
    for kind in ("noise", "occluded", "gain"):
        for peer in [peer for peer in peers if peer.removesuffix(scores.half) in ("concat", "can")]:
            if group := _everywhere(scores, kind):
                found = scores.difference(scores.reference, peer, group)
                claim = f"SAGE less {title(peer)}, {kind} in all modalities"
                claims.say(claim, _with_interval(*found), "above 0", bool(found[0] > 0))
    if corrupted and (plus := f"can-plus{scores.half}") in scores.methods:
        claims.less(plus, corrupted, f"SAGE less {title(plus)}, all corruptions", 0.01, sure=True)
    for name, what in ((CLEAN, "clean"), (ALL, "all corruptions")):
        if scores.sharing() and name in scores.groups:
            best = scores.best(scores.sharing(), scores.groups[name])
            claim = f"SAGE less the best that shares its memory and stuck rule ({title(best)}), {what}"
            claims.less(best, scores.groups[name], claim, None)


def _claims_on_parts(claims: _Claims) -> None:
    scores, ours = claims.scores, claims.scores.reference
    concat, one_stage = f"concat{scores.half}", f"sage-one-stage{scores.half}"
    if concat in scores.methods and TOLD in scores.methods and ALL in scores.groups:
        group = scores.groups[ALL]
        gap = scores.mean(TOLD, group) - scores.mean(concat, group)
        drawn = {m: _grouped(scores.drawn[m], group) for m in (ours, concat, TOLD)}
        share = (drawn[ours] - drawn[concat]) / (drawn[TOLD] - drawn[concat])
        value = (scores.mean(ours, group) - scores.mean(concat, group)) / gap
        claim = "share of the gap from concat to SAGE told the true noise, all corruptions"
        if gap > 0:
            claims.between((value, *interval(share)), claim, 0.6)
        else:
            claims.say(claim, "- (concat is not below it)", ">= +0.6", None)
    staged = [index for name, (index, *_) in scores.groups.items() if name.startswith("stage-")]
    if one_stage in scores.methods and staged:
        found = scores.difference(ours, one_stage, staged)
        claim = "SAGE less SAGE with one stage, stage-dependent corruptions"
        claims.say(claim, _with_interval(*found), "interval above 0", bool(found[1] > 0))


def _claims_on_failures(claims: _Claims) -> None:
    scores, peers = claims.scores, claims.scores.peers()
    survivor = _survivor(scores)
    for what, kinds, margin in (("dead", DEAD, 0.04), ("foreign", ("foreign",), 0.0)):
        group = _whole_clip(scores, kinds)
        if not group:
            continue
        if survivor is not None:
            claim = f"SAGE less the surviving modality alone, one {what} for the whole clip"
            claims.less(survivor, group, claim, -0.02 if what == "dead" else None)
        if peers:
            best = scores.best(peers, group)
            claim = f"SAGE less the best peer ({title(best)}), one modality {what} for the whole clip"
            claims.less(best, group, claim, margin)


def _claims_on_confidence(claims: _Claims) -> None:
    scores = claims.scores
    clean = [found for (_, k), found in sorted(scores.confidence.items()) if k == 0]
    if not clean:
        return
    costs = {c: scores.difference(scores.reference, _control(scores, c), scores.groups[CLEAN]) for c in PERMUTED}
    costs = {c: found for c, found in costs.items() if not np.isnan(found[0])}
    if costs:
        milder = min(costs, key=lambda control: costs[control][0])
        claim = f"permuted confidence costs, clean ({CONTROLS[milder]}, the milder of {len(costs)} permutations)"
        claims.between(costs[milder], claim, 0.03, sure=True)
    error = np.array([calibration_error(found["diagram"])[1] for found in clean])  # (N, M)
    claims.at_most(
        float(np.nanmax(np.nanmean(error, 0))), "calibration error after fitting, clean, the worse modality", 0.03
    )
    unseen = [kind for kind in _kinds(scores) if "foreign" not in kind and kind != "misaligned"]
    errors = {kind: _calibration_under(scores, kind, failing=True, when=1) for kind in unseen}
    errors = {kind: value for kind, value in errors.items() if not np.isnan(value)}
    if errors:
        worst = max(errors, key=lambda kind: errors[kind])
        claim = f"the same, the worst corruption but foreign and misaligned ({worst}), the modality that fails"
        claims.at_most(errors[worst], claim, 0.1)
    if "contingency" in clean[0]:
        agreement = np.array([adjusted_mutual_information(_alike(scores, found)) for found in clean])
        claim = "agreement of the stages with the true ones, those that trust alike taken as one (AMI), clean"
        claims.at_least(agreement, claim, 0.5)
        ranks = np.array([found["spearman"][-1] for found in clean])
        claims.at_least(ranks, "rank correlation of confidence with true reliability, clean, all modalities", 0.8)


# ------------------------------------------------------------------------------------------------------------ controls
def _control(scores: Scores, control: str) -> str:
    return control_name(scores.reference, control)


def _controls(scores: Scores) -> list[Table]:
    """What SAGE loses with other shares of its experts."""
    if not scores.confidence:
        return []
    shown = {name: group for name, group in scores.groups.items() if name in (CLEAN, ALL)}
    rows = []
    for control, what in CONTROLS.items():
        name = _control(scores, control)
        row = [what]
        for group in shown.values():
            row += [
                _number(scores.mean(name, group)),
                _with_interval(*scores.difference(scores.reference, name, group)),
            ]
        rows.append(row)
    note = (
        "P of the same model where the shares of its experts are those of another clip, or its own ones in another order "
        "(blocks of about 2 s), or held at their mean over the clip, and what that costs. What the experts say stays the same."
    )
    header = ["", *(text for name in shown for text in (f"P {name}", f"costs, {name}"))]
    return [Table("What the confidence is worth", header, rows, note)]


# --------------------------------------------------------------------------------------------------------- calibration
def _calibration(scores: Scores) -> list[Table]:
    results = scores.results
    if not scores.confidence:
        return []
    names, seeds = results.modalities, range(results.fits)
    error = {key: calibration_error(found["diagram"]) for key, found in scores.confidence.items()}  # (2, M) each

    def mean(values: Iterable[Any]) -> str:
        kept = [v for v in values if not np.isnan(v)]
        return _number(float(np.mean(kept))) if kept else "-"

    clean = [[f"{m}", *(mean([error[n, 0][when, i] for n in seeds]) for when in (0, 1))] for i, m in enumerate(names)]
    note = (
        "Mean over seeds of the mean gap between stated and observed reliability, 0 is perfect; 15 groups of equally "
        "many frames. Fitted on the validation split."
    )
    out = [Table("Calibration error of SAGE's confidence, clean", ("", "before", "after"), clean, note)]
    stage = [scores.confidence[n, 0]["stage_diagram"] for n in seeds]  # (stages, 2, M, 3, K) each
    rows = []
    for s in range(len(stage[0])):
        gaps = np.array([calibration_error(found[s]) for found in stage])  # (N, 2, M)
        rows.append([str(s + 1), *(mean(gaps[:, when, i]) for i in range(len(names)) for when in (0, 1))])
    header = ["", *(f"{m}, {when}" for m in names for when in ("before", "after"))]
    kind = "true stage" if results.truth else "most probable stage"
    out.append(Table(f"Calibration error by {kind}, clean", header, rows))
    rows = [
        [
            name,
            *(_number(_calibration_under(scores, name, failing, when)) for failing in (True, False) for when in (0, 1)),
            _number(_judged(scores, name)),
        ]
        for name in _kinds(scores)
    ]
    if rows:
        header = ["", "failing, before", "failing, after", "sound, before", "sound, after", "judged"]
        text = (
            "The modality that fails, and the one that does not (none where all fail); mean over the conditions. Judged: the "
            "share of the failing modality's frames in which the model takes it to be there. In the others (it is absent, or "
            "repeats itself) confidence is 0, and so is what it explains: they count with an error of 0."
        )
        out.append(Table("Calibration error by corruption", header, rows, text))
    return out


def _failing(scores: Scores, kind: str, failing: bool) -> Iterator[tuple[np.ndarray, float]]:
    """Of each condition of a kind, seed, and modality that fails (or that does not): its diagrams (2, 3, K), before and after
    fitting, and the share of its frames that they are of."""
    names, results = scores.results.modalities, scores.results
    for k in scores.groups[kind][0]:
        condition = results.conditions[k]
        assert condition is not None
        for i, name in enumerate(names):
            if (name in condition.modalities) != failing:
                continue
            for n in range(results.fits):
                found, clean = (scores.confidence[n, j]["diagram"][:, i] for j in (k, 0))
                yield found, float(np.nansum(found[0, 2]) / max(np.nansum(clean[0, 2]), 1))


def _calibration_under(scores: Scores, kind: str, failing: bool, when: int) -> float:
    """Calibration error of the modalities that fail, or of the others, in a kind's conditions, before (0) or after (1)
    fitting; NaN where there is none, and where none is ever taken to be there."""
    found = [judged * calibration_error(diagram)[when] for diagram, judged in _failing(scores, kind, failing) if judged]
    return float(np.mean(found)) if found else float("nan")


def _judged(scores: Scores, kind: str) -> float:
    found = [judged for _, judged in _failing(scores, kind, True)]
    return float(np.mean(found)) if found else float("nan")


def _alike(scores: Scores, found: dict[str, np.ndarray]) -> np.ndarray:
    """(S, *) the table of learnt and true stages, true ones that trust the same modalities taken as one."""
    table, trusts = found["contingency"], scores.results.trusts
    assert trusts is not None
    kinds = list(dict.fromkeys(trusts[: table.shape[1]]))
    merged = np.zeros((len(table), len(kinds)), table.dtype)
    for s in range(table.shape[1]):
        merged[:, kinds.index(trusts[s])] += table[:, s]
    return merged


def _stages(scores: Scores) -> list[Table]:
    results = scores.results
    clean = {n: found for (n, k), found in scores.confidence.items() if k == 0}
    return [*_agreement(scores, {n: c for n, c in clean.items() if "contingency" in c}), *_trust(results, clean)]


def _agreement(scores: Scores, clean: dict[int, dict[str, np.ndarray]]) -> list[Table]:
    if not clean:
        return []
    rows = [
        [
            str(n),
            adjusted_mutual_information(found["contingency"]),
            adjusted_mutual_information(_alike(scores, found)),
            *map(float, found["spearman"]),
        ]
        for n, found in sorted(clean.items())
    ]
    ranks = [f"rank correlation, {m}" for m in scores.results.modalities]
    header = ["seed", "adjusted mutual information", "the same, stages that trust alike as one", *ranks, "all"]
    note = (
        "Adjusted mutual information (1: the same, 0: chance) of the most probable stage with the true one, and with the "
        "true ones of which those that trust the same modalities are taken as one; Spearman's rank correlation of "
        "confidence after fitting with the true reliability, frames in which the modality is present."
    )
    return [Table("Confidence and stages against the truth, clean", header, rows, note)]


def _trust(results: Results, clean: dict[int, dict[str, np.ndarray]]) -> list[Table]:
    """What each learnt stage does."""
    if not clean or next(iter(clean.values()))["trust"].shape[0] < 2:
        return []
    rows = []
    for n, found in sorted(clean.items()):
        frames, whole, sums = found["trust"][:, 0], found["trust"][:, 1], found["trust"][:, 2:]
        every = sums.sum(0) / max(whole.sum(), 1)
        for s in np.argsort(-frames, kind="stable"):
            mean = sums[s] / whole[s] if whole[s] else np.full(len(results.modalities), np.nan)
            rows.append(
                [str(n), str(s + 1), _number(frames[s] / frames.sum()), *map(_number, mean),
                 trust_words(mean, every, results.modalities)]
            )  # fmt: skip
    note = (
        "Of each learnt stage the share of the frames in which it is the most probable, and the modalities' mean weights "
        "in those of them in which all are present, against the mean over all stages."
    )
    header = ["seed", "stage", "share of frames", *(f"weight, {m}" for m in results.modalities), ""]
    return [Table("What the stages do, clean", header, rows, note)]


MORE = 0.05  # of weight than on average, from which on a stage is said to trust a modality


def trust_words(weights: np.ndarray, average: np.ndarray, modalities: Sequence[str]) -> str:
    """A stage named by what it does: the modalities to which it gives clearly more weight than all stages do on average."""
    if np.isnan(weights).any():
        return "hardly occurs"
    trusted = [m for m, more in zip(modalities, weights - average) if more >= MORE]
    return f"trusts {' and '.join(trusted)}" if trusted else "as on average"


# ------------------------------------------------------------------------------------------------------------ pictures
def pictures(scores: Scores) -> list[Picture]:
    """Of each half, the second one's names ending in with-quality."""
    found = []
    for part in scores.halves():
        end, start = ("-with-quality", "With quality evidence. ") if part.half else ("", "")
        found += [Picture(p.name + end, start + p.caption, p.figure) for p in _pictures(part)]
    return found


def _pictures(scores: Scores) -> list[Picture]:
    found = [
        Picture("methods", "P clean and under all corruptions: mean over seeds, a dot a seed.", plot_methods(scores))
    ]
    if scores.reference in scores.methods and len(scores.methods) > 1:
        text = (
            f"SAGE less each method, with 95 % intervals of the bootstrap over {_drawn(scores.results)} and seeds; right of 0 "
            "SAGE wins."
        )
        found.append(Picture("differences", text, plot_differences(scores)))
    if ALL in scores.groups:
        text = "P by corruption and method: mean over seeds, severities and the modalities that fail."
        found.append(Picture("corruptions", text, plot_corruptions(scores)))
        if len(scores.results.study.severities) > 1:
            text = "P over severity, mean over seeds and the modalities that fail; methods without a colour are grey."
            found.append(Picture("severities", text, plot_severities(scores)))
    if scores.confidence:
        text = (
            "Reliability diagrams of SAGE's confidence, frames of all seeds in equal groups: stated against observed "
            "reliability, before and after post-hoc fitting, clean and by stage."
        )
        found.append(Picture("calibration", text, plot_calibration(scores)))
        if ALL in scores.groups:
            text = "The same by corruption, of the modality that fails: on the diagonal confidence is what it claims."
            found.append(Picture("calibration-corruptions", text, plot_calibration_corruptions(scores)))
        if "contingency" in scores.confidence[0, 0]:
            text = "How often each true stage occurs while the model holds a stage for the most probable, a seed each."
            found.append(Picture("stages", text, plot_stages(scores)))
    return found


@styled
def plot_methods(scores: Scores) -> Any:
    methods = _ranked(scores)[::-1]
    shown = [name for name in (CLEAN, ALL) if name in scores.groups]
    fig, axes = new_figure(10, 0.27 * len(methods) + 1.2, 1, len(shown), sharey=True)
    for axis, name in zip(axes[0], shown):
        group = scores.groups[name]
        for y, method in enumerate(methods):
            color = BLUE if method == scores.reference else "#777777" if method in CEILINGS else "black"
            values = _grouped(scores.measured[method], group)
            axis.plot(values, np.full(len(values), y), "o", color=color, alpha=0.35, markersize=3)
            axis.plot(values.mean(), y, "|", color=color, markersize=13, markeredgewidth=2)
        axis.set(title=name, xlabel="P")
    axes[0, 0].set_yticks(range(len(methods)), [title(m) for m in methods])
    return fig


@styled
def plot_differences(scores: Scores) -> Any:
    methods = [m for m in _ranked(scores) if m != scores.reference and m not in UNTRAINED][::-1]
    shown = [name for name in (CLEAN, ALL) if name in scores.groups]
    fig, axes = new_figure(10, 0.27 * len(methods) + 1.2, 1, len(shown), sharey=True)
    for axis, name in zip(axes[0], shown):
        for y, method in enumerate(methods):
            value, low, high = scores.difference(scores.reference, method, scores.groups[name])
            axis.plot((low, high), (y, y), color=BLUE, linewidth=2.2, solid_capstyle="butt")
            axis.plot(value, y, "o", color=BLUE, markersize=4.5)
        axis.axvline(0, color="#777777", linewidth=0.9)
        axis.set(title=name, xlabel="P of SAGE less P of the method")
    axes[0, 0].set_yticks(range(len(methods)), [title(m) for m in methods])
    return fig


@styled
def plot_corruptions(scores: Scores) -> Any:
    methods = _ranked(scores)
    kinds = [name for name in scores.groups if name != ALL]
    values = np.array([[scores.mean(m, scores.groups[k]) for k in kinds] for m in methods])
    fig, axes = new_figure(2.6 + 0.5 * len(kinds), 1.6 + 0.26 * len(methods))
    axis = axes[0, 0]
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    low, high = np.nanmin(values), np.nanmax(values)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = (value - low) / max(high - low, 1e-9) < 0.6
            said = f"{value:.2f}".replace("0.", ".", 1)
            axis.text(column, row, said, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    axis.set_yticks(range(len(methods)), [title(m) for m in methods])
    axis.grid(False)
    fig.colorbar(image, ax=axis, label="P", fraction=0.03)
    return fig


def _highlighted(scores: Scores) -> dict[str, tuple[str, Any]]:
    """method -> colour and dash."""
    peers = scores.peers()
    wanted = [f"{name}{scores.half}" for name in ("concat", "uniform")]
    wanted += [scores.best(peers, scores.groups[ALL])] if peers else []
    wanted += [m + ALONE + scores.half for m in scores.results.modalities]
    chosen = [m for m in dict.fromkeys(wanted) if m in scores.methods][: len(COLORS)]
    return {scores.reference: (BLUE, "-"), **{m: (COLORS[i], DASH[(i + 1) % 4]) for i, m in enumerate(chosen)}}


@styled
def plot_severities(scores: Scores) -> Any:
    kinds = [name for name in scores.groups if name not in (CLEAN, ALL)]
    columns = min(len(kinds), 5)
    rows = -(-len(kinds) // columns)
    fig, axes = new_figure(2.3 * columns + 0.4, 2.0 * rows + 0.8, rows, columns, sharex=True, sharey=True)
    colored, conditions = _highlighted(scores), scores.results.conditions
    for axis, kind in zip(axes.flat, kinds):
        for method in scores.methods:
            levels: dict[int, list[int]] = {0: [0]}
            for k in scores.groups[kind][0]:
                condition = conditions[k]
                assert condition is not None
                levels.setdefault(condition.severity, []).append(k)
            y = [scores.mean(method, [index]) for _, index in sorted(levels.items())]
            color, dash = colored.get(method, ("black", TOP[method]) if method in TOP else (GREY, "-"))
            order, wide = (3, 2.0) if method == scores.reference else (2, 1.3) if method in colored else (1, 0.8)
            axis.plot(sorted(levels), y, color=color, linestyle=dash, linewidth=wide, zorder=order, label=title(method))
        axis.set(title=kind, xticks=range(6))
    _label_grid(axes, len(kinds), "severity (0: clean)", "P")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    kept = [i for i, m in enumerate(scores.methods) if m in colored or m in TOP]
    fig.legend([handles[i] for i in kept], [labels[i] for i in kept], loc="outside lower center", ncols=4)
    return fig


def pooled_diagram(diagrams: np.ndarray) -> np.ndarray:
    """(..., 3, K) diagrams (mean confidence, observed reliability, frames) -> (3, BINS) of all their frames: bins
    sorted by confidence and joined into groups of about equally many frames."""
    predicted, observed, frames = np.moveaxis(diagrams, -2, 0).reshape(3, -1)
    kept = np.nan_to_num(frames) > 0
    order = np.argsort(predicted[kept], kind="stable")
    predicted, observed, frames = (x[kept][order] for x in (predicted, observed, frames))
    out = np.full((3, BINS), np.nan)
    place = ((np.cumsum(frames) - frames / 2) / frames.sum() * BINS).astype(int)
    for b in range(BINS):
        here = place == b
        if here.any():
            weight = frames[here] / frames[here].sum()
            out[:, b] = (weight * predicted[here]).sum(), (weight * observed[here]).sum(), frames[here].sum()
    return out


def _label_grid(axes: Any, used: int, x: str, y: str) -> None:
    """Hides the panels past `used`, and names the axes at the grid's left and lower edge."""
    for axis in axes.flat[used:]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x)
    for axis in axes[:, 0]:
        axis.set_ylabel(y)


def _diagonal(axis: Any, found: np.ndarray) -> None:
    """found: (*, 2, 3, K), drawn as the pooled diagrams before and after."""
    axis.plot((0, 1), (0, 1), color="#777777", linewidth=0.9)
    for when, (name, color, dash) in enumerate((("before", VERMILLION, DASH[1]), ("after", BLUE, "-"))):
        if np.nansum(found[..., when, 2, :]) > 0:
            x, y, _ = pooled_diagram(found[..., when, :, :])
            error = np.nanmean(calibration_error(found[..., when, :, :]))
            label = f"{name}, error {error:.3f}"
            axis.plot(x, y, color=color, linestyle=dash, marker="o", markersize=2.5, label=label)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    if len(axis.lines) > 1:
        axis.legend(loc="upper left", fontsize=6.5)


@styled
def plot_calibration(scores: Scores) -> Any:
    results = scores.results
    clean = [scores.confidence[n, 0] for n in range(results.fits)]
    whole = np.stack([c["diagram"] for c in clean])  # (N, 2, M, 3, K)
    stage = np.stack([c["stage_diagram"] for c in clean])  # (N, stages, 2, M, 3, K)
    count = stage.shape[1]
    fig, axes = new_figure(
        2.3 * (count + 1) + 0.4, 2.4 * len(results.modalities) + 0.4, len(results.modalities), count + 1, sharey=True
    )
    for m, name in enumerate(results.modalities):
        _diagonal(axes[m, 0], whole[:, :, m])
        axes[m, 0].set(title=f"{name}, clean", ylabel="observed reliability")
        for s in range(count):
            _diagonal(axes[m, s + 1], stage[:, s, :, m])
            axes[m, s + 1].set_title(f"{name}, stage {s + 1}")
    for axis in axes[-1]:
        axis.set_xlabel("confidence")
    return fig


@styled
def plot_calibration_corruptions(scores: Scores) -> Any:
    results = scores.results
    kinds = [name for name in scores.groups if name not in (CLEAN, ALL)]
    columns = min(len(kinds), 6)
    rows = -(-len(kinds) // columns)
    fig, axes = new_figure(2.2 * columns + 0.3, 2.35 * rows + 0.3, rows, columns, sharex=True, sharey=True)
    for axis, kind in zip(axes.flat, kinds):
        found = []
        for k in scores.groups[kind][0]:
            condition = results.conditions[k]
            assert condition is not None
            failing = [results.modalities.index(m) for m in condition.modalities]
            found += [scores.confidence[n, k]["diagram"][:, i] for n in range(results.fits) for i in failing]
        _diagonal(axis, np.stack(found))
        axis.set_title(kind)
    _label_grid(axes, len(kinds), "confidence", "observed")
    return fig


@styled
def plot_stages(scores: Scores) -> Any:
    results = scores.results
    count = min(results.study.seeds, 5)
    fig, axes = new_figure(2.3 * count + 0.6, 2.7, 1, count, sharey=True)
    for n, axis in enumerate(axes[0]):
        table = scores.confidence[n, 0]["contingency"].astype(float)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(share):
            axis.text(column, row, f"{value:.2f}".replace("0.", ".", 1), ha="center", va="center", fontsize=7,
                      color="white" if value > 0.55 else "black")  # fmt: skip
        agreement = adjusted_mutual_information(scores.confidence[n, 0]["contingency"])
        held = table.sum(1) / table.sum()
        axis.set_yticks(range(len(held)), [f"{s + 1} ({held[s]:.0%})" for s in range(len(held))])
        axis.set_xticks(range(table.shape[1]), [str(s + 1) for s in range(table.shape[1])])
        axis.set(title=f"seed {n}: AMI {agreement:.2f}", xlabel="true stage")
        axis.grid(False)
    axes[0, 0].set_ylabel("learnt stage (share)")
    return fig


# ---------------------------------------------------------------------------------------------------------------- page
def protocol(results: Results) -> str:
    """In words, what was compared."""
    study, base = results.study, results.study.base()
    fps = results.fps
    window = base.spans(fps).window / fps
    steps = f"{base.max_steps} steps, {base.epochs} epochs at most," if base.max_steps else f"{base.epochs} epochs"
    where = (
        f"{study.folds} folds of {len(set(results.groups))} groups of videos, each scored by models of the other folds; rate, "
        f"epoch and calibration chosen on one in {HELD_OUT} of their groups, which were not trained on"
        if study.folds is not None
        else "Scored on the test split with the synthesiser's truth; rate, epoch and calibration chosen on the validation split"
        if results.truth
        else f"Scored on the validation split; rate, epoch and calibration chosen on one in {HELD_OUT} training videos, "
        "which were not trained on"
    )
    kinds = {c.corruption for c in results.conditions if c is not None}
    return (
        f"{where}. Trained with {_seeds(study.seeds)} for {steps} "
        f"of {base.batch_size} windows of {window:g} s; width {base.dim}; "
        f"peak rates {', '.join(f'{r:g}' for r in study.rates)}, chosen on {_seeds(study.tuning_seeds)}; the same "
        f"rehearsed failures for all. {len(kinds)} corruptions in {len(results.conditions) - 1} conditions at "
        f"severities {', '.join(map(str, study.severities))}. sage-ext {__version__}."
    )


def write_study(results: Results, out: Path, *, draws: int = 2000) -> tuple[list[Table], Path]:
    """report.md, report.html and the pictures, into `out`; returns the tables and the page."""
    scores = score(results, draws)
    drawn, text = pictures(scores), protocol(results)
    found = tables(scores)
    page = write_report(out, "Comparison of fusion methods", drawn, [Table("Protocol", (), [], text), *found])
    parts = ["# Comparison of fusion methods", text, *(table.markdown() for table in found)]
    parts += [f"![{picture.caption}]({picture.name}.png)\n\n{picture.caption}" for picture in drawn]
    write_atomic(out / "report.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return found, page


__all__ = ["Scores", "score", "tables", "write_study"]
