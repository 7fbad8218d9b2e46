"""Our own tries to beat the paper's score, each under its own name.

* `klas-mse`: Γ times the share of variance that T leaves. Probes see classes only; the residual sees
  whether a linear layer can map the features at all.
* `klas-calibrated`: Γ of probes brought to their best temperature (Guo et al. 2017, arXiv
  1706.04599). KL rewards a source that is unsure and punishes one that is sure; probes of early and
  late blocks differ in this for reasons that have nothing to do with stitching.
* `output-kl`: what the stitch does in the end, right after T, against the target's own answers; like
  direct matching it executes every candidate, but a distribution says more per image than a hit.
"""

from __future__ import annotations

from klas_zoo.selection.candidates import Candidate
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.scoring import Terms, by_score, gamma, value_of


def _gamma_and_residual(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    score, terms = gamma(candidate, measured)
    left = value_of("residual", candidate, measured)
    return score * left, {**terms, "residual": left}


def _calibrated(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    return gamma(candidate, measured, of="calibrated")


def _output_kl(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    found = value_of("output_kl", candidate, measured)
    return found, {"output_kl": found}


OWN = (
    by_score(
        "klas-mse", "Γ times what the least-squares T leaves unexplained",
        "Γ · ‖T x_i − y_j‖² / ‖y_j − ȳ_j‖²", {"probes", "residual"}, _gamma_and_residual,
    ),
    by_score(
        "klas-calibrated", "Γ of probes brought to their best temperature on other held-out images",
        "Γ of softmax(z / t)", {"calibrated"}, _calibrated,
    ),
    by_score(
        "output-kl", "divergence of the stitch's answers from the target's right after the closed-form T",
        "KL(target ‖ stitch)", {"output_kl"}, _output_kl,
    ),
)  # fmt: skip
