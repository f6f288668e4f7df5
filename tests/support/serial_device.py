"""The device's end of a serial link as a model, behind a pseudo-terminal, with a line that errs."""

import contextlib
import os
import random
import select
import threading
import tty

import numpy as np

from moeaccel.host.errors import HostError
from moeaccel.interface.link import (
    HELLO_BYTES,
    MAX_PAYLOAD,
    REGISTER_BYTES,
    WINDOW,
    FrameReader,
    Hello,
    Opcode,
    Reply,
    Request,
    Status,
    frame,
)
from moeaccel.interface.registers import ADDRESS_BITS


class LinkDevice:
    """What moeaccel.hdl.boards.serial_link does, over any transport (as the golden model's).

    ``executed`` lists the requests that were executed, in order. ``hang`` makes the buses silent.
    """

    def __init__(self, transport, **hello):
        self.transport = transport
        self.hello = hello
        self.executed = []
        self.hang = False
        self._reader = FrameReader()
        self._expected = 0
        self._last = (0, 0)
        self._endings = {}
        self._reported = False

    @property
    def damaged(self):
        """Frames that arrived damaged."""
        return self._reader.damaged

    def feed(self, data):
        """Take received bytes and return what is sent."""
        out = b""
        for content in self._reader.feed(data):
            if content is None:
                out += self._reply(Opcode.NOTICE, Status.DAMAGED)
            else:
                out += self._serve(Request.parse(content))
        return out + self.poll()

    def poll(self):
        """Return a notice, if the interrupt has risen."""
        if self.transport.wait_interrupt(0) and not self._reported:
            return self._reply(Opcode.NOTICE, Status.OK)
        return b""

    def _reply(self, opcode, status, payload=b""):
        number, attempt = self._last
        self._reported = self.transport.wait_interrupt(0)
        return frame(Reply(
            number=number, opcode=opcode, attempt=attempt, status=status, payload=payload,
            interrupt=self._reported, expected=self._expected).content())

    def _serve(self, request):
        self._last = request.number, request.attempt
        age = (self._expected - request.number) % 256
        in_order = age == 0 or request.opcode == Opcode.HELLO
        writes = bool(request.opcode & 1)
        if in_order:
            self._expected = (request.number + 1) % 256
        if not in_order and age > WINDOW:
            return self._reply(request.opcode, Status.OUT_OF_ORDER)
        if not in_order and writes:
            return self._reply(request.opcode, self._endings[request.number])
        payload = b""
        if not self._good(request):
            status = Status.BAD_REQUEST
        else:
            status, payload = self._execute(request)
        if in_order and writes:
            self._endings[request.number] = status
        return self._reply(request.opcode, status, payload)

    @staticmethod
    def _good(request):
        match request.opcode:
            case Opcode.HELLO:
                return request.count == HELLO_BYTES
            case Opcode.MEMORY_READ | Opcode.MEMORY_WRITE:
                return request.count <= MAX_PAYLOAD
            case Opcode.REGISTER_READ | Opcode.REGISTER_WRITE:
                return request.count == REGISTER_BYTES and request.address % 4 == 0 \
                    and request.address < 1 << ADDRESS_BITS
        return False

    def _execute(self, request):
        self.executed.append(request)
        transport, address = self.transport, request.address
        made_up = b"" if request.opcode & 1 else bytes(request.count)
        if request.opcode == Opcode.HELLO:
            return Status.OK, Hello(**{
                "nonce": address, "memory_bytes": transport.memory_bytes} | self.hello).payload()
        if self.hang and request.count:
            return Status.BUS_TIMEOUT, made_up
        try:
            match request.opcode:
                case Opcode.MEMORY_READ:
                    return Status.OK, transport.memory_read(address, request.count).tobytes()
                case Opcode.MEMORY_WRITE:
                    transport.memory_write(address, np.frombuffer(request.payload, np.uint8))
                case Opcode.REGISTER_READ:
                    return Status.OK, transport.register_read(address).to_bytes(4, "little")
                case Opcode.REGISTER_WRITE:
                    transport.register_write(address, int.from_bytes(request.payload, "little"))
        except HostError:
            is_memory = request.opcode in (Opcode.MEMORY_READ, Opcode.MEMORY_WRITE)
            return Status.NO_MEMORY if is_memory else Status.BUS_ERROR, made_up
        return Status.OK, b""


class Noise:
    """Damages bytes: each is flipped in one bit, lost or doubled with a third of ``rate``."""

    def __init__(self, rate, seed):
        self.rate = rate
        self.random = random.Random(seed)
        self.count = 0

    def __call__(self, data):
        out = bytearray()
        for byte in data:
            if self.random.random() >= self.rate:
                out.append(byte)
                continue
            self.count += 1
            match self.random.randrange(3):
                case 0:
                    out.append(byte ^ 1 << self.random.randrange(8))
                case 1:
                    out += bytes([byte, byte])
        return bytes(out)


class SerialStandIn:
    """A device behind a pseudo-terminal, served by a thread.

    Parameters
    ----------
    device : object with ``feed(bytes)`` and ``poll()``, both returning bytes to send
    link : path
        Where the port appears; the same one after ``unplug`` and ``plug``.
    to_device, to_host : callable
        What the line does to bytes.
    """

    def __init__(self, device, link, *, to_device=bytes, to_host=bytes):
        self.device = device
        self.path = str(link)
        self.to_device, self.to_host = to_device, to_host
        self.silent = False
        self.received = 0
        self._thread = None
        self.plug()

    def plug(self):
        """Make the port appear."""
        self._master, slave = os.openpty()
        tty.setraw(slave)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.symlink(os.ttyname(slave), self.path)
        self._slave = slave  # held open, else the master reports that nobody is there
        self._end, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def unplug(self):
        """Make the port vanish; a second call does nothing."""
        if self._thread is None:
            return
        os.write(self._stop, b"x")
        self._thread.join()
        self._thread = None
        for descriptor in (self._master, self._slave, self._end, self._stop):
            os.close(descriptor)
        os.unlink(self.path)

    def _serve(self):
        while True:
            ready, _, _ = select.select([self._master, self._end], [], [], 0.002)
            if self._end in ready:
                return
            data = os.read(self._master, 4096) if ready else b""
            self.received += len(data)
            if self.silent:
                continue
            out = self.device.feed(self.to_device(data)) if data else self.device.poll()
            out = self.to_host(out)
            while out:
                out = out[os.write(self._master, out):]
