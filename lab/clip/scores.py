"""Scores of one run on its test pictures, as plain numbers."""

from __future__ import annotations

from typing import Any

import torch

WRONG = 24  # most confidently wrong pictures that are kept
CONFUSED = 30  # most frequent confusions that are kept
FULL_MATRIX = 200  # classes up to which the whole confusion matrix is kept


def score(logits: torch.Tensor, labels: torch.Tensor, keys: list[str]) -> dict[str, Any]:
    """Logits (n, c), labels (n,), picture names → accuracy, accuracy and count per class, confusion (rows: truth,
    columns: prediction, counts; None beyond 200 classes), the most frequent confusions, and the pictures that were
    most confidently wrong (confidence: softmax probability of the wrong class)."""
    count = logits.shape[1]
    predicted = logits.argmax(1)
    right = predicted == labels
    totals = torch.bincount(labels, minlength=count)
    hits = torch.bincount(labels[right], minlength=count)
    pairs = labels * count + predicted
    mistaken, times = torch.unique(pairs[~right], return_counts=True)
    frequent = torch.argsort(times, descending=True, stable=True)[:CONFUSED]
    matrix = None
    if count <= FULL_MATRIX:
        matrix = torch.bincount(pairs, minlength=count * count).view(count, count).tolist()
    probabilities = logits.softmax(1)
    confidence = probabilities.gather(1, predicted[:, None]).squeeze(1)
    order = torch.argsort(confidence.masked_fill(right, -1.0), descending=True, stable=True)[:WRONG]
    return {
        "accuracy": right.float().mean().item(),
        "test_pictures": len(labels),
        "per_class": [h / t if t else None for h, t in zip(hits.tolist(), totals.tolist(), strict=True)],
        "per_class_count": totals.tolist(),
        "confusion": matrix,
        "confused": [
            {"truth": pair // count, "predicted": pair % count, "count": n}
            for pair, n in zip(mistaken[frequent].tolist(), times[frequent].tolist(), strict=True)
        ],
        "wrong": [
            {
                "picture": keys[i],
                "truth": int(labels[i]),
                "predicted": int(predicted[i]),
                "confidence": round(float(confidence[i]), 4),
                "truth_probability": round(float(probabilities[i, labels[i]]), 4),
            }
            for i in order.tolist()
            if not right[i]
        ],
    }
