"""Counts of hits, misses, bytes and seconds."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts what a model's pools and reads do, for the ``Experts:`` line and benchmarks.

    Args:
        hits (int): Experts that a layer call needed and found in a slot.
        misses (int): Experts that it had to read.
        evictions (int): Experts that left a slot for others.
        bytes_read (int): Bytes of experts read, from disk or from the OS page cache.
        read_seconds (float): Time spent waiting for these reads.
        sync_seconds (float): Time spent waiting for routers' indices, while the device computes.
        lookahead_used (int): Prefetched experts that the next call of a layer needed. They count as hits, too.
        lookahead_wasted (int): Prefetched experts that it did not need.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    sync_seconds: float = 0.0
    lookahead_used: int = 0
    lookahead_wasted: int = 0

    def summary(self) -> str:
        """Return one line for people, e.g. ``92.4% from memory, 1.31 GB read, 5.8 GB/s``."""
        share = 100 * self.hits / max(1, self.hits + self.misses)
        rate = self.bytes_read / 1e9 / max(1e-9, self.read_seconds)
        line = f"{share:.1f}% from memory, {self.bytes_read / 1e9:.2f} GB read, {rate:.1f} GB/s"
        if prefetched := self.lookahead_used + self.lookahead_wasted:
            line += f", {100 * self.lookahead_used / prefetched:.0f}% of {prefetched} prefetched experts used"
        return line
