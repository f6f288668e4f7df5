"""The cycle model: how many clock cycles a command takes behind an ideal memory.

It follows the hardware block by block; each block is a *cycle function*, from the cycles in which
something goes in to the cycles in which something comes out, in the file of the block's name.
Nothing is followed step by step: the array advances by tiles, the weight stream by bursts,
everything else by rows and passes, and where tiles repeat they are passed over, so that a prefill
layer of real size takes two seconds. Cycle 0 is the first one of the fetch of the submission.

::

    command --> dispatcher --+-- x loads -----------------------------------+
                             +-- images ---> bursts --> words --> ring --> array --> h --> array
                             +-- passes --------------------------------^                    |
                                                  y <-- drains <-- y buffer <----------------+

What waits for what: a burst for room in the beat FIFO; a word for room in the ring and in the FIFO
of row exponents; a step for its word, its x or h and a place for its result; a pass for its x; its
down section for the y buffer; a drain for the next pass to be known; the dispatcher for the parser,
for the pass before the last, and for the entry of an expert. Reads share the port in the order of
their requests, and wait while something is written.

Of several channels, channel 0 is followed: all read the same weights in step, and only channel 0
moves anything else.

The memory is ideal (``MemoryModel.ideal``): it never refuses, has a fixed latency and one port for
reads and writes. Accuracy, held by tests/system/test_cycles.py: 1 % or 16 cycles of the RTL;
typically it is exact. What is not: bursts of two readers in the same cycles, and writes of every
other cycle, which are taken eight beats at a time.
"""

from moeaccel.cycles.combiner import COMBINER_CYCLES, FLOAT_CYCLES, SUMS_READ_CYCLES
from moeaccel.cycles.commands import (
    expert_cycles,
    linear_cycles,
    predict_command,
    predict_experts,
    predict_linear,
)
from moeaccel.cycles.hidden_buffer import ACTIVATION_CYCLES, QUANTISER_CYCLES
from moeaccel.cycles.memory_port import READ_CYCLES, WRITE_CYCLES
from moeaccel.cycles.prediction import Prediction
from moeaccel.cycles.result_serialiser import ADDER_CYCLES, SERIALISER_CYCLES, element_cycles
from moeaccel.cycles.sequencer import ARRAY_CYCLES
from moeaccel.cycles.tile_buffer import ROW_EXPONENTS
from moeaccel.cycles.weight_streamer import CREDIT_CYCLES, GRANT_CYCLES

__all__ = [
    "ACTIVATION_CYCLES", "ADDER_CYCLES", "ARRAY_CYCLES", "COMBINER_CYCLES", "CREDIT_CYCLES",
    "FLOAT_CYCLES", "GRANT_CYCLES", "QUANTISER_CYCLES", "READ_CYCLES", "ROW_EXPONENTS",
    "SERIALISER_CYCLES", "SUMS_READ_CYCLES", "WRITE_CYCLES", "Prediction", "element_cycles",
    "expert_cycles", "linear_cycles", "predict_command", "predict_experts", "predict_linear"]
