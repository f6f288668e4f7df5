"""All blocks, and one command in an idle machine."""

from __future__ import annotations

from moeaccel.cycles.activation_loader import ActivationLoader
from moeaccel.cycles.combiner import Combiner
from moeaccel.cycles.command_processor import fetch
from moeaccel.cycles.dispatcher import Dispatcher
from moeaccel.cycles.expert_buffer import ExpertBuffer
from moeaccel.cycles.expert_table import ExpertTable
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.prediction import Prediction
from moeaccel.cycles.schedule import NEVER, Schedule
from moeaccel.cycles.sequencer import Sequencer
from moeaccel.cycles.tile_buffer import TileBuffer
from moeaccel.cycles.weight_streamer import WeightStreamer
from moeaccel.interface.commands import ENTRY_BYTES


class Machine:
    """One command in an idle machine.

    Parameters
    ----------
    job : :class:`Job`
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._schedule = schedule = Schedule()
        self._port = port = MemoryPort(job.latency)
        self._streamer = WeightStreamer(job.config, port)
        self._tiles = TileBuffer(job.config, schedule, self._streamer)
        self._sequencer = Sequencer(job, schedule, self._tiles)
        self._combiner = Combiner(
            job, schedule, port, self._sequencer.waiting)
        self._dispatcher = Dispatcher(
            job, schedule, port, self._streamer, self._tiles,
            ActivationLoader(job, schedule, port), self._combiner,
            ExpertTable(job, schedule, port), ExpertBuffer(job, self._streamer))

    def run(self) -> Prediction:
        """Return the prediction."""
        schedule, streamer, tiles = self._schedule, self._streamer, self._tiles
        schedule.start(0, fetch(
            self._job, self._port,
            lambda cycle: schedule.start(cycle, self._dispatcher.run(cycle))))
        self._combiner.start()
        array = self._sequencer.run()
        while True:
            streamer.take_up()
            tile, grant = tiles.next_tile(), streamer.grant()
            process = schedule.next
            if process == tile == grant == NEVER:
                return self._prediction()
            if process <= min(tile, grant + 1):
                schedule.resume()
            elif tile <= grant + 1:
                tiles.accept()
                next(array)
                tiles.skip(process)
            else:
                streamer.issue(grant)
            next(array)  # it goes as far as what is known carries it

    def _prediction(self) -> Prediction:
        port, width, array = self._port, self._job.config.port_bytes, self._sequencer
        weights = self._streamer.beats - self._streamer.held
        finished = self._dispatcher.finished
        active = (array.busy + array.starved_weights + array.starved_activations
                  + array.stalled_output)
        return Prediction(
            cycles=finished,
            busy=array.busy,
            starved_weights=array.starved_weights,
            starved_activations=array.starved_activations,
            stalled_output=array.stalled_output,
            idle=finished - active,
            bytes_read_weights=weights * width * self._job.config.channels,
            bytes_read_other=(port.beats_read - weights) * width,
            bytes_written=port.beats_written * width + ENTRY_BYTES,
        )
