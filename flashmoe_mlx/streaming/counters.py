"""What streaming did, in numbers."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Feeds the ``Experts:`` line and the benchmarks.

    Args:
        hits (int): experts that a layer call needed and found in a slot.
        misses (int): experts that it had to read.
        evictions (int): experts that had to leave a slot for others.
        bytes_read (int): expert bytes read from the checkpoint, from disk or from the OS page cache.
        read_seconds (float): time spent waiting for these reads.
        sync_seconds (float): time spent waiting for routers' choices, while the device computes.
        lookahead_used (int): experts read ahead that the next call of a layer needed. They are hits.
        lookahead_wasted (int): experts read ahead that it did not need.
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
        """One line for people, e.g. ``92.4% from memory, 1.31 GB read, 5.8 GB/s``."""
        share = 100 * self.hits / max(1, self.hits + self.misses)
        rate = self.bytes_read / 1e9 / max(1e-9, self.read_seconds)
        line = f"{share:.1f}% from memory, {self.bytes_read / 1e9:.2f} GB read, {rate:.1f} GB/s"
        if ahead := self.lookahead_used + self.lookahead_wasted:
            line += f", {100 * self.lookahead_used / ahead:.0f}% of {ahead} read ahead were used"
        return line
