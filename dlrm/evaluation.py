"""How good predictions are, and what a test prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dlrm.options import Options


@dataclass(frozen=True)
class Scores:
    """Of all predictions on a test set. Shares are of 1; where a class is missing, AUC and AP are NaN."""

    loss: float
    accuracy: float  # predictions on their target's side of one half
    recall: float
    precision: float
    f1: float
    ap: float  # average precision
    auc: float  # area under the ROC curve

    @classmethod
    def of(cls, loss: float, probability: Tensor, target: Tensor) -> Scores:
        """`probability` and `target`: (samples, 1); targets above one half are of class 1."""
        probability, positive = probability.flatten().cpu().numpy(), target.flatten().cpu().numpy() > 0.5
        hits, misses = ranking(probability, positive)
        positives, negatives = hits[-1], misses[-1]
        predicted = probability > 0.5
        found = int((predicted & positive).sum())
        return cls(
            loss=loss,
            accuracy=float((predicted == positive).mean()),
            recall=ratio(found, positives, of_none=0.0),
            precision=ratio(found, int(predicted.sum()), of_none=0.0),
            f1=ratio(2 * found, positives + int(predicted.sum()), of_none=0.0),
            ap=ratio((np.diff(hits) * hits[1:] / (hits[1:] + misses[1:])).sum(), positives),
            auc=ratio((np.diff(misses) * (hits[1:] + hits[:-1])).sum() / 2, positives * negatives),
        )


def ranking(probability: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each threshold, from above all predictions to below: how many of class 1, and of class 0, lie above it."""
    order = np.argsort(-probability, kind="stable")
    last_of_equals = np.append(np.diff(probability[order]) != 0, True).nonzero()[0]
    hits = np.append(0, np.cumsum(positive[order])[last_of_equals]).astype(np.float64)
    return hits, np.append(0, last_of_equals + 1) - hits


def ratio(part: float, whole: float, of_none: float = math.nan) -> float:
    return float(part / whole) if whole else of_none


@dataclass
class Best:
    """Of all tests so far."""

    accuracy: float = 0.0
    auc: float = 0.0

    def update(self, scores: Scores) -> None:
        self.accuracy = max(self.accuracy, scores.accuracy)
        self.auc = max(self.auc, 0.0 if math.isnan(scores.auc) else scores.auc)

    def reached(self, options: Options) -> str:
        """Which threshold is reached, in the public script's words; empty if none is."""
        if 0 < options.mlperf_acc_threshold <= self.accuracy:
            return f"MLPerf testing accuracy threshold {options.mlperf_acc_threshold} reached, stop training"
        if 0 < options.mlperf_auc_threshold <= self.auc:
            return f"MLPerf testing auc threshold {options.mlperf_auc_threshold} reached, stop training"
        return ""


def test_line(iteration: int, iterations: int, epoch: int, scores: Scores, best: Best, all_metrics: bool) -> str:
    """In the format that scripts parse."""
    line = f"Testing at - {iteration}/{iterations} of epoch {epoch}, loss {scores.loss:.6f}, "
    auc = f"auc {scores.auc:.4f}, best auc {best.auc:.4f}"
    accuracy, best_accuracy = f"accuracy {100 * scores.accuracy:3.3f} %", f"{100 * best.accuracy:3.3f} %"
    if not all_metrics:
        return line + f"{accuracy}, best {best_accuracy}, {auc}"
    others = ", ".join(f"{name} {getattr(scores, name):.4f}" for name in ("recall", "precision", "f1", "ap"))
    return line + f"{others}, {auc}, {accuracy}, best accuracy {best_accuracy}"
