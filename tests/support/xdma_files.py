"""The XDMA driver's character devices, served by a transport: registers, memory, interrupt."""

import errno
import os


class StandIn:
    """The files of one card; what is behind them may vanish and come back.

    Parameters
    ----------
    card : moeaccel.host.transports.base.Transport
        Serves them; stays open.
    rng : numpy.random.Generator, optional
        Transfers end early at random places.

    Attributes
    ----------
    gone : bool
        Nothing answers: registers read all ones, transfers fail, opening fails.
    fail : dict of str to int
        Error number by file's name, for its next call.
    calls : list
        (name, count, position) of transfers.
    """

    def __init__(self, card, *, rng=None):
        self.card = card
        self.rng = rng
        self.gone = False
        self.fail = {}
        self.calls = []
        self.opened = {}
        self.locked = False
        self._level = False
        self._events = 0

    def _check(self, name, code=errno.EIO):
        if name in self.fail:
            code = self.fail.pop(name)
        elif not self.gone:
            return
        raise OSError(code, os.strerror(code))

    def _sample(self):
        """Count an edge of the interrupt, as the card's DMA does."""
        level = self.card.wait_interrupt(0)
        self._events += level and not self._level
        self._level = level

    def open(self, path, flags):
        name = path.name.partition("_")[2]
        self._check(name, errno.ENXIO)
        assert {"user": os.O_RDWR | os.O_SYNC, "h2c_0": os.O_WRONLY}.get(name, os.O_RDONLY) == flags
        handle = 100 + len(self.opened)
        self.opened[handle] = name
        return handle

    def lock(self, handle):
        assert self.opened[handle] == "user"
        if self.locked:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        self.locked = True

    def map(self, handle, count):
        assert (self.opened[handle], count) == ("user", 4096)
        self._check("map")
        return Words(self)

    def _part(self, buffer, position, name):
        assert position % 64 == 0 or self.rng is not None
        self.calls.append((name, len(buffer), position))
        return len(buffer) if self.rng is None else int(self.rng.integers(1, len(buffer) + 1))

    def read(self, handle, buffer, position):
        assert self.opened[handle] == "c2h_0"
        self._check("c2h_0")
        count = self._part(buffer, position, "c2h_0")
        buffer[:count] = self.card.memory_read(position, count).tobytes()
        return count

    def write(self, handle, buffer, position):
        assert self.opened[handle] == "h2c_0"
        self._check("h2c_0")
        count = self._part(buffer, position, "h2c_0")
        self.card.memory_write(position, bytes(buffer[:count]))
        return count

    def wait_event(self, handle, timeout_s):
        assert self.opened[handle] == "events_0"
        self._check("events_0", errno.ENODEV)
        self._sample()
        if not self._events and not self._level:  # a level that stays gives no edge
            self.card.wait_interrupt(timeout_s)
            self._sample()
        found, self._events = bool(self._events), 0
        return found

    def close(self, handle):
        if self.opened.pop(handle) == "user":
            self.locked = False


class Words:
    """The mapped registers."""

    def __init__(self, files):
        self._files = files

    def __getitem__(self, index):
        if self._files.gone:
            return 0xFFFF_FFFF
        value = self._files.card.register_read(4 * index)
        self._files._sample()
        return value

    def __setitem__(self, index, value):
        if not self._files.gone:
            self._files.card.register_write(4 * index, value)
            self._files._sample()

    def close(self):
        pass
