"""Whether a model is right as often as it believes to be."""

import numpy as np


def calibration_error(confidences: np.ndarray, correct: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, section 3), in 0..1; 0 is calibrated.

    The mean distance between confidence and accuracy over bins of equal width, each by its size.

    Args:
      confidences: [N], the probability that the model gave to its answer, in 0..1.
      correct: [N] bool, whether the answer was right.
    """
    confidences, correct = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    if not len(confidences):
        return 0.0
    bins = np.minimum((confidences * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=confidences - correct, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidences))
