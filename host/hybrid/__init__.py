"""Experts on two sides at once: some on the torch device, the others on the accelerator, as a
policy says.

``runtime`` is the call, and what is on the torch device; ``images`` is how it comes there, and
``places`` where the only copy of an image is, where there is one;
``exact`` and ``grouped`` compute it, with the device's integers or in bfloat16; ``counters`` is
what happened; ``lanes`` is where moves run beside computing.
"""

from moeaccel.host.hybrid.counters import Counters
from moeaccel.host.hybrid.runtime import Hybrid, ResidentMath

__all__ = ["Counters", "Hybrid", "ResidentMath"]
