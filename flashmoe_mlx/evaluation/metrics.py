"""How far a model's predictions are from the text and from a reference's, with what chance alone would explain."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_Z = 1.959964  # 95% of a normal distribution lie within this many standard deviations
_BLOCK = 16  # neighbouring positions share words and context, so blocks of them are what is taken for independent


class Estimate(NamedTuple):
    """A figure and its 95% confidence interval.

    Args:
        value (float): what was measured.
        low (float): the lower end of the interval, nan where one sample says nothing about it.
        high (float): its upper end.
    """

    value: float
    low: float
    high: float


def mean(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """The mean of a series whose neighbours resemble each other.

    The interval is ``mean +- 1.96 s / sqrt(b)``, where ``s`` is the standard deviation of the means of ``b`` blocks of
    about 16 neighbours: the method of batch means (Law, Simulation Modeling and Analysis, chapter 9).

    Args:
        values: at least one, in order.
    """
    series = np.asarray(values, dtype=np.float64)
    value = float(series.mean())
    if len(series) < 2:
        return Estimate(value, float("nan"), float("nan"))
    blocks = np.array_split(series, max(2, len(series) // _BLOCK))
    margin = _Z * float(np.std([block.mean() for block in blocks], ddof=1)) / sqrt(len(blocks))
    return Estimate(value, value - margin, value + margin)


def share(successes: int, total: int) -> Estimate:
    """How often something succeeds, from independent trials, with Wilson's score interval (1927, JASA 22, 209).

    Args:
        successes (int): from 0 to ``total``.
        total (int): at least one.
    """
    p, z2 = successes / total, _Z**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    margin = _Z * sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # At 0 and at 1 an end is p itself, which rounding must not push to the other side.
    return Estimate(p, max(0.0, min(p, centre - margin)), min(1.0, max(p, centre + margin)))


class Line(NamedTuple):
    """What :func:`compare` finds at one position.

    Args:
        nll (float): negative log probability of the token that came, in nats.
        reference_nll (float): the reference's.
        kld (float): divergence from the reference, in nats.
        agrees (float): 1 if both like the same token best, else 0.
    """

    nll: float
    reference_nll: float
    kld: float
    agrees: float


def compare(logprobs: mx.array, reference: mx.array, target: int) -> Line:
    """What one position says.

    The divergence is ``sum p_ref (log p_ref - log p)`` over the vocabulary, in nats (Kullback and Leibler, 1951, Annals
    of Mathematical Statistics 22, 79).

    Args:
        logprobs (mx.array): float32 ``[vocabulary]``, natural logarithms of probabilities that add up to 1.
        reference (mx.array): the same of the reference.
        target (int): the token that came.

    """
    # Where the reference gives no probability at all, nothing is lost, and inf - inf would be nan.
    terms = mx.where(reference == -mx.inf, 0, mx.exp(reference) * (reference - logprobs))
    same = mx.argmax(logprobs) == mx.argmax(reference)
    line = mx.stack([-logprobs[target], -reference[target], terms.sum(), same.astype(mx.float32)])
    return Line(*(float(figure) for figure in np.asarray(line)))


@dataclass(frozen=True)
class Quality:
    """A model against a reference, both shown the same text.

    Args:
        positions (int): tokens that were predicted.
        perplexity (Estimate): ``exp`` of the mean negative log probability of the text's tokens (Jelinek et al., 1977,
            JASA 62, S63); the interval is that of the mean, through ``exp``.
        perplexity_ratio (Estimate): perplexity over the reference's. Both read the same text, so its interval is much
            narrower: ``exp`` of the mean difference of the log probabilities.
        kld (Estimate): mean divergence from the reference, in nats a token.
        kld_p99 (float): its 99th percentile: 1 position in 100 is worse.
        agreement (Estimate): share of positions where both like the same token best.
    """

    positions: int
    perplexity: Estimate
    perplexity_ratio: Estimate
    kld: Estimate
    kld_p99: float
    agreement: Estimate

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Self:
        """From the lines of all positions, in order; there is at least one."""
        nll, reference_nll, kld, agrees = np.asarray(lines, dtype=np.float64).T
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
