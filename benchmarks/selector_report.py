"""What the tables of compare_selectors.py say: areas, gains over SN-Net, rank correlations, and the curves.

    python benchmarks/selector_report.py            # reads results/selectors, writes summary.md and pictures there

Areas are those of klas_zoo.frontier, scaled to the anchors as they were before tuning, so that all runs of
a family share one scale. Spread is the standard deviation over seeds.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klas_zoo.frontier import area, frontier

HERE = Path(__file__).parent / "results" / "selectors"
Row = dict[str, str]
Point = tuple[float, float]
BASELINE = "snnet"
RUN_FIELDS = ("seed", "selector", "route", "source", "i", "target", "j", "macs", "bucket", "reason", "top1", "seconds")
TOGETHER = ("all both", "all")  # runs in which every candidate was tuned
SHOWN = (
    "klas", "klas both", "snnet", "snnet both", "direct", "random", "self", "output-kl both few (shared buckets)",
    "all both",
)  # fmt: skip
WAYS = {"up": "", "down": " down", "both ways": " both", "few up": " few", "few both ways": " both few"}
LEVELS = 200  # of cost or accuracy at which two frontiers are compared


def read(file: Path) -> list[Row]:
    """Rows of a table, without the lines that say where it was measured."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(line for line in opened if not line.startswith("#")))


def points(rows: Iterable[Row]) -> list[Point]:
    return [(float(row["macs"]), float(row["top1"])) for row in rows]


def by(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows grouped by one field, or by several as a tuple."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)].append(row)
    return groups


def shown(values: Sequence[float], digits: int = 3, *, sign: bool = False) -> str:
    """Mean ± standard deviation over seeds; a dash where there is none."""
    if not values or np.isnan(values).any():
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}{spread}"


def best_within(curve: Sequence[Point], macs: float) -> float:
    """Best top-1 that so many multiply-adds can buy."""
    return max((top1 for cost, top1 in curve if cost <= macs), default=float("nan"))


def smallest_with(curve: Sequence[Point], top1: float) -> float:
    """Fewest multiply-adds that reach an accuracy."""
    return min((cost for cost, found in curve if found >= top1), default=float("nan"))


def gains(curve: Sequence[Point], baseline: Sequence[Point], ends: tuple[Point, Point]) -> dict[str, float]:
    """Of one frontier over another: points of top-1 at equal cost, and times fewer MACs at equal top-1."""
    grid = np.linspace(ends[0][0], ends[1][0], LEVELS)
    ahead = np.array([best_within(curve, c) - best_within(baseline, c) for c in grid])
    highest = min(max(t for _, t in curve), max(t for _, t in baseline))
    lowest = max(min(curve)[1], min(baseline)[1])
    ratios = [
        smallest_with(baseline, level) / smallest_with(curve, level)
        for level in np.linspace(lowest, highest, LEVELS)
    ]
    return {
        "mean points": float(np.nanmean(ahead)), "max points": float(np.nanmax(ahead)),
        "median ratio": float(np.median(ratios)), "max ratio": float(np.max(ratios)),
    }  # fmt: skip


def spearman(scores: Sequence[float], top1: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank. NaN where either never changes."""
    a, b = (_ranks(np.asarray(values)) for values in (scores, top1))
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman_by_bucket(scored: Iterable[dict[str, Any]]) -> float:
    """Spearman of −score with top-1 inside each bucket of at least four candidates, averaged."""
    buckets: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for one in scored:
        buckets[one["bucket"]].append((-one["score"], one["top1"]))
    each = [spearman(*zip(*inside, strict=True)) for inside in buckets.values() if len(inside) >= 4]
    return float(np.nanmean(each)) if each else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


class Family:
    """The tables of one family and what follows from them."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = folder.name, folder
        self.about = (folder / "candidates.csv").read_text().partition("\n")[0].lstrip("# ")
        self.candidates = read(folder / "candidates.csv")
        self.runs = by(read(folder / "runs.csv"), "selector", "seed")
        self.cascades = read(folder / "cascades.csv")
        chosen = folder / "selections.csv"
        self.selections = {
            (row["selector"], row["seed"]): set(row["routes"].split())
            for row in (read(chosen) if chosen.exists() else [])
        }
        anchors = [row for row in self.candidates if not row["target"]]
        ends = sorted(set(points(anchors)))
        self.anchors = {row["route"]: points([row])[0] for row in anchors}
        self.ends = (ends[0], ends[-1])
        self.seeds = sorted({row["seed"] for row in self.candidates}, key=int)
        self.selectors = list(dict.fromkeys(selector for selector, _ in self.runs))

    def curve(self, selector: str, seed: str) -> list[Point]:
        return frontier(points(self.runs[selector, seed]), lambda p: p[0], lambda p: p[1])

    def each(self, selector: str, value: Callable[[str], float]) -> list[float]:
        """A value of every seed the selector was run with."""
        return [value(seed) for seed in self.seeds if (selector, seed) in self.runs]

    def area(self, selector: str, seed: str) -> float:
        return area(self.curve(selector, seed), *self.ends)

    def together(self, seed: str) -> list[Row]:
        """The run in which every candidate was tuned, if there is one."""
        return next((self.runs[name, seed] for name in TOGETHER if (name, seed) in self.runs), [])

    def area_kept(self, selector: str, seed: str) -> float:
        """The area of what a selector keeps of a supernet in which every candidate was tuned; its anchors stay."""
        chosen = self.selections[selector, seed]
        kept = [row for row in self.together(seed) if not row["target"] or row["route"] in chosen]
        return area(frontier(points(kept), lambda p: p[0], lambda p: p[1]), *self.ends)

    def kept(self, selector: str, value: Callable[[str], float]) -> list[float]:
        """A value of every seed in which some of what the selector chose was tuned with everything else."""
        return [value(seed) for seed in self.seeds if self.tuned_of(selector, seed)]

    def tuned_of(self, selector: str, seed: str) -> set[str]:
        """What a selector chose of the candidates; SN-Net's windows hold stitches that are none."""
        return self.selections.get((selector, seed), set()) & {row["route"] for row in self.together(seed)}

    def is_up(self, row: Row) -> bool:
        """Whether a stitch goes from the smaller anchor to the larger one."""
        return self.anchors[row["source"]] < self.anchors[row["target"]]

    def area_ahead(self, selector: str, over: str) -> list[float]:
        return self.each(
            selector,
            lambda seed: self.area(selector, seed) - self.area(over, seed) if (over, seed) in self.runs else np.nan,
        )

    def gain(self, selector: str, what: str) -> list[float]:
        """Over SN-Net; NaN where that was not run by itself."""
        return self.each(
            selector,
            lambda s: (
                gains(self.curve(selector, s), self.curve(BASELINE, s), self.ends)[what]
                if (BASELINE, s) in self.runs
                else np.nan
            ),
        )

    def stitches(self, selector: str) -> list[float]:
        return self.each(selector, lambda seed: sum(bool(row["target"]) for row in self.runs[selector, seed]))

    def on_frontier(self, selector: str) -> list[float]:
        anchors = set(self.anchors)

        def count(seed: str) -> float:
            rows = self.runs[selector, seed]
            best = frontier(rows, lambda r: float(r["macs"]), lambda r: float(r["top1"]))
            return sum(row["route"] not in anchors for row in best)

        return self.each(selector, count)

    def correlation(self, score: str, *, after_tuning: bool, quarters: bool, up: bool = True) -> list[float]:
        """Spearman of −score with top-1 by bucket, or by quarter of a pair's range of costs, one value per seed.

        Of stitches in one direction. After tuning: where all candidates were tuned together, else where those that
        KLAS chose were.
        """
        found = []
        for seed, rows in by((r for r in self.candidates if r["target"] and self.is_up(r) == up), "seed").items():
            run = self.together(seed) or self.runs.get(("klas", seed), [])
            top1 = {row["route"]: float(row["top1"]) for row in (run if after_tuning else rows)}
            known = [
                {
                    "score": float(row[f"score {score}"]),
                    "top1": top1[row["route"]],
                    "bucket": (row["source"], row["target"], self.quarter(row) if quarters else row["bucket"]),
                }
                for row in rows
                if row[f"score {score}"] and row["route"] in top1
            ]
            if known:
                found.append(spearman_by_bucket(known))
        return found

    def quarter(self, row: Row) -> int:
        """In which quarter of the costs between its two anchors a stitch lies, 0..3."""
        low, high = sorted((self.anchors[row["source"]][0], self.anchors[row["target"]][0]))
        return min(3, int(4 * (float(row["macs"]) - low) / (high - low)))

    def share_of_best(self, selector: str) -> list[float]:
        """Buckets whose best candidate up after tuning (in the supernet of all) the selector chose, per cent.

        No value for selectors that also stitch down.
        """
        if " both" in selector or " down" in selector:
            return []
        return self.each(
            selector, lambda seed: self.share_of_best_of({row["route"] for row in self.runs[selector, seed]}, seed)
        )

    def share_of_best_of(self, chosen: Set[str], seed: str) -> float:
        """The same of any set of routes; NaN where not all candidates were tuned together."""
        everything = [row for row in self.together(seed) if row["target"] and self.is_up(row)]
        if not everything:
            return float("nan")
        groups = by(everything, "source", "target", "bucket").values()
        best = [max(inside, key=lambda row: float(row["top1"]))["route"] for inside in groups]
        return 100 * sum(route in chosen for route in best) / len(best)

    def cascade_curve(self) -> list[Point]:
        rows = [row for row in self.cascades if row["seed"] == self.seeds[0]]
        return frontier([*points(rows), *self.anchors.values()], lambda p: p[0], lambda p: p[1])

    @property
    def scores(self) -> list[str]:
        return [name.removeprefix("score ") for name in self.candidates[0] if name.startswith("score ")]


def markdown(family: Family) -> str:
    """All numbers of one family as two tables."""
    anchors = ", ".join(f"{name} {cost / 1e6:.1f} M, {top1:.2f} %" for name, (cost, top1) in family.anchors.items())
    lines = [
        f"## {family.name}", "",
        f"Anchors before tuning: {anchors}. {len(family.seeds)} seeds. Area of the anchors alone "
        f"{area(list(family.anchors.values()), *family.ends):.3f}, with cascades "
        f"{area(family.cascade_curve(), *family.ends):.3f}.", "",
        "| selector | stitches | on the frontier | area | Δ area to snnet | to snnet both | to klas | "
        "points at equal MACs: mean, max | times fewer MACs at equal top-1: median, max | "
        "best of buckets found, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    areas = {name: family.each(name, partial(family.area, name)) for name in family.selectors}
    for name in sorted(areas, key=lambda one: -statistics.fmean(areas[one])):
        gained = {what: family.gain(name, what) for what in ("mean points", "max points", "median ratio", "max ratio")}
        cells = [
            name,
            shown(family.stitches(name), 0),
            shown(family.on_frontier(name), 1),
            shown(areas[name]),
            *(shown(family.area_ahead(name, over), sign=True) for over in (BASELINE, f"{BASELINE} both", "klas")),
            f"{shown(gained['mean points'], 2, sign=True)}, {shown(gained['max points'], 2, sign=True)}",
            f"{shown(gained['median ratio'], 2)}, {shown(gained['max ratio'], 2)}",
            shown(family.share_of_best(name), 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [*tuned_together(family), *correlations(family)]
    return "\n".join([*lines, *ablations(family.folder / "ablations.csv"), "", f"Measured on: `{family.about}`", ""])


def correlations(family: Family) -> list[str]:
    """A table for stitches up, and one for stitches down where there are any."""
    lines = []
    for up in sorted({family.is_up(row) for row in family.candidates if row["target"]}, reverse=True):
        lines += [
            "",
            f"| Spearman of score and top-1, stitches {'up' if up else 'down'} | after the closed form, by bucket | "
            "by quarter of the costs | after tuning, by bucket | by quarter |",
            "|---|---|---|---|---|",
        ]
        for name in family.scores:
            values = [
                shown(family.correlation(name, after_tuning=tuned, quarters=quarters, up=up), 2, sign=True)
                for tuned in (False, True)
                for quarters in (False, True)
            ]
            lines.append(f"| {' | '.join([name, *values])} |")
    return lines


def tuned_together(family: Family) -> list[str]:
    """A table of what every selector keeps of one supernet; nothing where not all candidates were tuned in one."""
    selectors = list(dict.fromkeys(name for name, _ in family.selections))
    suffixes = sorted((suffix for suffix in WAYS.values() if suffix), key=len, reverse=True)
    plain = [name for name in selectors if not name.endswith(tuple(suffixes))]
    rows = []
    for name in plain:
        cells = []
        for suffix in WAYS.values():
            one = name + suffix
            areas = family.kept(one, partial(family.area_kept, one))
            cells.append(f"{_count_kept(family, one)}: {shown(areas)}" if areas else "–")
        rows.append((name, cells))
    if all(cell == "–" for _, cells in rows for cell in cells):
        return []
    return [
        "",
        "Stitches and area of what each selector keeps of one supernet in which every candidate was tuned:",
        "",
        f"| selector | {' | '.join(WAYS)} |",
        f"|---|{'---|' * len(WAYS)}",
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows),
    ]


def _count_kept(family: Family, selector: str) -> str:
    """How many stitches were kept; of how many chosen, where some are no candidates."""
    tuned = family.kept(selector, lambda seed: len(family.tuned_of(selector, seed)))
    chosen = family.kept(selector, lambda seed: len(family.selections[selector, seed]))
    return shown(tuned, 0) if tuned == chosen else f"{shown(tuned, 0)} of {shown(chosen, 0)}"


def ablations(file: Path) -> list[str]:
    """A table of what ablations.py wrote, if it did."""
    if not file.exists():
        return []
    lines = [
        "",
        "| setting | value | selector | stitches | area, all tuned together | Spearman | best of the buckets found |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    columns = ("stitches", "area", "spearman", "share of best")
    for key, rows in by(read(file), "ablation", "value", "selector").items():
        values = {name: [float(row[name]) for row in rows] for name in columns}
        cells = [
            *key,
            shown(values["stitches"], 0),
            shown(values["area"]),
            shown(values["spearman"], 2, sign=True),
            f"{shown(values['share of best'], 1)} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(family: Family, path: Path, selectors: Sequence[str]) -> None:
    """Frontiers of some selectors, the mean over seeds with a band of one standard deviation; cascades; anchors."""
    figure = Figure(figsize=(8.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    grid = np.linspace(family.ends[0][0], family.ends[1][0], LEVELS)
    for name in (one for one in selectors if one in family.selectors):
        found = np.array(
            [[best_within(family.curve(name, s), c) for c in grid] for s in family.seeds if (name, s) in family.runs]
        )
        mean, spread = found.mean(0), found.std(0)
        (line,) = axes.step(grid / 1e6, mean, where="post", label=name)
        axes.fill_between(grid / 1e6, mean - spread, mean + spread, step="post", color=line.get_color(), alpha=0.15)
    cascades = [best_within(family.cascade_curve(), c) for c in grid]
    axes.step(grid / 1e6, cascades, where="post", color="black", linestyle="--", label="cascades (mean cost)")
    x, y = zip(*family.anchors.values(), strict=True)
    axes.plot(np.array(x) / 1e6, y, ":", marker="*", markersize=14, color="tab:gray", label="anchors before tuning")
    axes.set_xlabel("multiply-adds, M per image")
    axes.set_ylabel("top-1, % of the test images")
    axes.set_title(f"{family.name}: frontiers after the same tuning, {len(family.seeds)} seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, format="png", metadata={"Software": "klas-zoo"})


def main() -> None:
    folders = sorted(path.parent for path in HERE.glob("*/runs.csv"))
    pages = []
    for folder in folders:
        family = Family(folder)
        pages.append(markdown(family))
        draw(family, folder / "frontiers.png", SHOWN)
    intro = ["# Selectors compared", "", "Made by `selector_report.py`: mean ± standard deviation over seeds.", ""]
    text = "\n".join([*intro, *pages])
    (HERE / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
