"""Quality metrics against a text and a reference, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_Z = 1.959964
"""Standard deviations around the mean that hold 95% of a normal distribution."""

_BLOCK = 16
"""Neighboring positions that are averaged before they are taken as independent: they share words and context."""


class Estimate(NamedTuple):
    """A figure and its 95% confidence interval.

    Args:
        value (float): The measured figure.
        low (float): Lower end of the interval. nan if a single sample does not give one.
        high (float): Upper end.
    """

    value: float
    low: float
    high: float


def mean(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Return the mean of a series whose neighbors are correlated.

    The interval is ``mean +- 1.96 s / sqrt(b)``, where ``s`` is the standard deviation of the means of ``b`` blocks of
    about 16 neighbors: the method of batch means (Law, Simulation Modeling and Analysis, chapter 9).

    Args:
        values (Sequence[float]): At least one, in order.
    """
    series = np.asarray(values, dtype=np.float64)
    value = float(series.mean())
    if len(series) < 2:
        return Estimate(value, float("nan"), float("nan"))
    blocks = np.array_split(series, max(2, len(series) // _BLOCK))
    margin = _Z * float(np.std([block.mean() for block in blocks], ddof=1)) / sqrt(len(blocks))
    return Estimate(value, value - margin, value + margin)


def share(successes: int, total: int) -> Estimate:
    """Return the share of successes in independent trials, with Wilson's score interval (1927, JASA 22, 209).

    Args:
        successes (int): From 0 to ``total``.
        total (int): At least one.
    """
    p, z2 = successes / total, _Z**2
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    margin = _Z * sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Rounding could otherwise push an end past p where p is 0 or 1.
    return Estimate(p, max(0.0, min(p, center - margin)), min(1.0, max(p, center + margin)))


class PositionScore(NamedTuple):
    """A model against a reference at one position of a text.

    Args:
        nll (float): Negative log probability of the next token, in nats.
        reference_nll (float): The same of the reference.
        kld (float): Kullback-Leibler divergence from the reference, in nats.
        agrees (float): 1 if both give the highest probability to the same token, else 0.
    """

    nll: float
    reference_nll: float
    kld: float
    agrees: float


def compare(logprobs: mx.array, reference: mx.array, target: int) -> PositionScore:
    """Compare two predictions of one token.

    The divergence is ``sum p_ref (log p_ref - log p)`` over the vocabulary (Kullback and Leibler, 1951, Annals of
    Mathematical Statistics 22, 79).

    Args:
        logprobs (mx.array): float32 ``[vocabulary]`` log probabilities of the model.
        reference (mx.array): float32 ``[vocabulary]`` log probabilities of the reference.
        target (int): The token that came next.
    """
    # A token to which the reference gives no probability adds nothing, where inf - inf would be nan.
    terms = mx.where(reference == -mx.inf, 0, mx.exp(reference) * (reference - logprobs))
    same = mx.argmax(logprobs) == mx.argmax(reference)
    figures = mx.stack([-logprobs[target], -reference[target], terms.sum(), same.astype(mx.float32)])
    return PositionScore(*(float(figure) for figure in np.asarray(figures)))


@dataclass(frozen=True)
class Quality:
    """A model against a reference on the same text.

    Args:
        positions (int): Number of predicted tokens.
        perplexity (Estimate): ``exp`` of the mean negative log probability of the text's tokens (Jelinek et al., 1977,
            JASA 62, S63). The interval is ``exp`` of the mean's.
        perplexity_ratio (Estimate): Perplexity over the reference's: ``exp`` of the mean difference of the log
            probabilities. Both read the same text, so its interval is much narrower.
        kld (Estimate): Mean divergence from the reference, in nats per token.
        kld_p99 (float): 99th percentile of the divergence.
        agreement (Estimate): Share of positions where both give the highest probability to the same token.
    """

    positions: int
    perplexity: Estimate
    perplexity_ratio: Estimate
    kld: Estimate
    kld_p99: float
    agreement: Estimate

    @classmethod
    def of(cls, scores: Sequence[PositionScore]) -> Self:
        """Summarize all positions of a text, in order. There must be at least one."""
        nll, reference_nll, kld, agrees = np.asarray(scores, dtype=np.float64).T
        return cls(
            positions=len(nll),
            perplexity=_exp(mean(nll)),
            perplexity_ratio=_exp(mean(nll - reference_nll)),
            kld=mean(kld),
            kld_p99=float(np.percentile(kld, 99)),
            agreement=share(int(agrees.sum()), len(agrees)),
        )


def _exp(logarithm: Estimate) -> Estimate:
    return Estimate(*(float(np.exp(figure)) for figure in logarithm))
