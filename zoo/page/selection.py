"""How stitches were chosen, from a build's report.json: the map of block similarities, and a word for each route."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

DIGITS = 4  # significant ones of a value on the map: what a colour shows


def chosen_because(
    kind: str, settings: Mapping[str, Any], report: Mapping[str, Any] | None
) -> Callable[[str, bool], str]:
    """What led to a route, as a function of its name and of whether it is an anchor."""
    selection = (report or {}).get("selection", {})
    candidates = {one["route"]: one for one in selection.get("candidates", ()) if one.get("reason")}
    shipped = settings.get("shipped") is True
    own = settings.get("selection")
    selector = selection.get("selector") or (own.get("selector", "") if isinstance(own, Mapping) else "")

    def because(route: str, plain: bool) -> str:
        if plain:
            return "anchor of the family" if kind == "build" else "plain network"
        if shipped:
            return "comes with the family's tuned supernet"
        one = candidates.get(route)
        if one is None:
            return f"chosen by {selector}" if selector else ""
        score = f", score {one['score']:.3g}" if isinstance(one.get("score"), (int, float)) else ""
        return f"{selector}: {_REASONS.get(one['reason'], one['reason'])} (bucket {one['bucket'] + 1}{score})"

    return because


_REASONS = {
    "best": "best of its cost bucket",
    "tied": "within τ of the best of its bucket",
    "kept": "among the best of its bucket",
    "covers": "the only one that enters this block",
}


def selection_of(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Maps of pairs of anchors, source by target, and the stitches that were chosen on them; None without any.

    Θ has a row for each block of the source and one for its output, a column for each block of the target and one for
    its output; scores belong to candidates only.
    """
    selection = report.get("selection") or {}
    candidates = selection.get("candidates") or []
    between = ((selection.get("measurements") or {}).get("probes") or {}).get("between") or []
    theta = {(source, target): table for source, target, table in between if source != target}
    pairs = []
    for source, target in sorted({(one["source"], one["target"]) for one in candidates} | set(theta)):
        own = [one for one in candidates if (one["source"], one["target"]) == (source, target)]
        if own or (source, target) in theta:
            pairs.append(_pair(source, target, theta.get((source, target)), own))
    if not pairs:
        return None
    return {"selector": selection.get("selector", ""), "score": selection.get("score", ""), "pairs": pairs}


def _pair(source: str, target: str, theta: Any, candidates: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "source": source,
        "target": target,
        "theta": theta and [[_rounded(value) for value in row] for row in theta],
        "scores": [[one["i"], one["j"], _rounded(one["score"])] for one in candidates if one.get("score") is not None],
        "chosen": [[one["i"], one["j"], one["route"], one["reason"]] for one in candidates if one.get("reason")],
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def evaluated_only(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Routes that were evaluated and have no engine: cheaper ones are as accurate."""
    return [
        {"route": one["route"], "macs": one["cost"]["macs"], "top1": one["top1"]}
        for one in report.get("routes", ())
        if not any(engine["status"] != "refused" for engine in one["engines"])
    ]
