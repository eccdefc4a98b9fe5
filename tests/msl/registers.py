"""Registers of Apple's GPUs, and the threads that they allow."""

from tests.msl.generated import Text
from tests.msl.opencl import Compiled

APPLE_REGISTERS = 128
"""32-bit registers of a thread."""

# Half-registers of a thread, and the threads of a threadgroup that fit with them: the table of Mesa's compiler for
# Apple's GPUs, `agx_occupancy_for_register_count`.
_OCCUPANCY = (
    *((104, 1024), (112, 896), (128, 832), (136, 768), (144, 704)),
    *((160, 640), (184, 576), (208, 512), (232, 448), (256, 384)),
)


def max_threads(registers: int) -> int:
    """Return the largest threadgroup of a kernel with these 32-bit registers, 0 if it must spill."""
    return next((threads for halves, threads in _OCCUPANCY if 2 * registers <= halves), 0)


def over_budget(text: Text, compiled: Compiled) -> str:
    """Describe a kernel with more registers than its launch allows, or return an empty string."""
    allowed = max_threads(compiled.registers)
    if compiled.spilled or text.threads > allowed:
        return f"{text}: {compiled.registers} registers allow {allowed} threads, {compiled.spilled} bytes spilled"
    return ""


def table(texts: list[Text], outcomes: list[Compiled]) -> str:
    """Return one line for each kernel and size of its threadgroups: how many registers its texts need."""
    found: dict[tuple[str, int], list[int]] = {}
    for text, outcome in zip(texts, outcomes, strict=True):
        found.setdefault((text.kernel, text.threads), []).append(outcome.registers)
    lines = [f"{'kernel':18} threads  texts  registers  allowed threads"]
    for (kernel, threads), registers in sorted(found.items()):
        span = f"{min(registers)} to {max(registers)}"
        lines.append(f"{kernel:18} {threads:7} {len(registers):6}  {span:>9}  {max_threads(max(registers)):15}")
    return "\n".join(lines)
