"""Scores of predictions on a test set, and the lines that tests print."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dlrm.options import Options


@dataclass(frozen=True)
class Scores:
    """Quality of the predictions for a whole test set; all but the loss are between 0 and 1.

    All but the loss are NaN if a prediction is NaN. AUC is NaN unless the test set has samples of both classes, and AP
    unless it has samples of class 1. Recall, precision and F1 are 0 where they would be 0 / 0.
    """

    loss: float
    accuracy: float  # share of predictions on the same side of one half as their target
    recall: float
    precision: float
    f1: float
    ap: float  # average precision
    auc: float  # area under the ROC curve

    @classmethod
    def of(cls, loss: float, probability: Tensor, target: Tensor) -> Scores:
        """Computes the scores of predictions `probability` (samples, 1) for `target` (samples, 1).

        Targets above one half are of class 1, all others of class 0. `loss` is the mean loss of the same predictions.
        """
        probability, is_positive = probability.flatten().cpu().numpy(), target.flatten().cpu().numpy() > 0.5
        if np.isnan(probability).any():
            return cls(loss, *[math.nan] * 6)
        positives_above, negatives_above = count_above_thresholds(probability, is_positive)
        positives, negatives = positives_above[-1], negatives_above[-1]
        all_above = positives_above[1:] + negatives_above[1:]
        predicted_positive = probability > 0.5
        true_positives = int((predicted_positive & is_positive).sum())
        predicted_positives = int(predicted_positive.sum())
        trapezoids = np.diff(negatives_above) * (positives_above[1:] + positives_above[:-1]) / 2
        return cls(
            loss=loss,
            accuracy=float((predicted_positive == is_positive).mean()),
            recall=ratio(true_positives, positives, if_undefined=0.0),
            precision=ratio(true_positives, predicted_positives, if_undefined=0.0),
            f1=ratio(2 * true_positives, positives + predicted_positives, if_undefined=0.0),
            ap=ratio((np.diff(positives_above) * positives_above[1:] / all_above).sum(), positives),
            auc=ratio(trapezoids.sum(), positives * negatives),
        )


def count_above_thresholds(probability: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many samples of class 1, and how many of class 0, lie above each threshold.

    There is one threshold above all probabilities, then one right below each distinct probability, in descending order.
    Both results have shape (1 + distinct probabilities,) and dtype float64.
    """
    descending = np.argsort(-probability, kind="stable")
    last_of_equals = np.append(np.diff(probability[descending]) != 0, True).nonzero()[0]
    positives_above = np.append(0, np.cumsum(is_positive[descending])[last_of_equals]).astype(np.float64)
    return positives_above, np.append(0, last_of_equals + 1) - positives_above


def ratio(part: float, whole: float, if_undefined: float = math.nan) -> float:
    """Returns part / whole, or `if_undefined` if `whole` is 0."""
    return float(part / whole) if whole else if_undefined


def nan_is_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


@dataclass
class Best:
    """Highest accuracy and highest AUC of all tests so far, each between 0 and 1."""

    accuracy: float = 0.0
    auc: float = 0.0

    def update(self, scores: Scores) -> None:
        """Takes the accuracy and the AUC of `scores` into account, unless they are NaN."""
        self.accuracy = max(self.accuracy, scores.accuracy, key=nan_is_lowest)
        self.auc = max(self.auc, scores.auc, key=nan_is_lowest)

    def reached(self, options: Options) -> str:
        """Names the MLPerf threshold that has been reached, in the reference script's words. Empty if none has been."""
        if 0 < options.mlperf_acc_threshold <= self.accuracy:
            return f"MLPerf testing accuracy threshold {options.mlperf_acc_threshold} reached, stop training"
        if 0 < options.mlperf_auc_threshold <= self.auc:
            return f"MLPerf testing auc threshold {options.mlperf_auc_threshold} reached, stop training"
        return ""


def test_line(iteration: int, iterations: int, epoch: int, scores: Scores, best: Best, all_metrics: bool) -> str:
    """Returns the line for a test after `iteration` of an epoch's `iterations`, in a format that scripts parse.

    `all_metrics` adds recall, precision, F1 and AP, and puts all values in the reference script's order.
    """
    line = f"Testing at - {iteration}/{iterations} of epoch {epoch}, loss {scores.loss:.6f}, "
    auc = f"auc {scores.auc:.4f}, best auc {best.auc:.4f}"
    accuracy, best_accuracy = f"accuracy {100 * scores.accuracy:3.3f} %", f"{100 * best.accuracy:3.3f} %"
    if not all_metrics:
        return line + f"{accuracy}, best {best_accuracy}, {auc}"
    others = ", ".join(f"{name} {getattr(scores, name):.4f}" for name in ("recall", "precision", "f1", "ap"))
    return line + f"{others}, {auc}, {accuracy}, best accuracy {best_accuracy}"
