"""AXI4 and AXI4-Lite signatures, seen from the master; flat names, as in Verilog."""

from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class AXI4Signature(wiring.Signature):
    """The subset of AXI4 that bursts of whole beats need (no lock, cache, prot, qos, region, user).

    Parameters
    ----------
    addr_width : :class:`int`
        Bits of a byte address, 1 to 64.
    data_width : :class:`int`
        Bits of a beat: a power of two from 8 to 1024.
    id_width : :class:`int`
        Bits of a transaction's id, 1 or more.
    """

    def __init__(self, addr_width, data_width, id_width):
        if not isinstance(addr_width, int) or not 1 <= addr_width <= 64:
            raise ValueError(f"addr_width must be from 1 to 64, not {addr_width!r}")
        if data_width not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(
                f"data_width must be a power of two from 8 to 1024, not {data_width!r}")
        if not isinstance(id_width, int) or id_width < 1:
            raise ValueError(f"id_width must be 1 or more, not {id_width!r}")
        self._addr_width = addr_width
        self._data_width = data_width
        self._id_width = id_width
        super().__init__({
            "awid": Out(id_width),
            "awaddr": Out(addr_width),
            "awlen": Out(8),
            "awsize": Out(3),
            "awburst": Out(2),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(data_width),
            "wstrb": Out(data_width // 8),
            "wlast": Out(1),
            "wvalid": Out(1),
            "wready": In(1),
            "bid": In(id_width),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
            "arid": Out(id_width),
            "araddr": Out(addr_width),
            "arlen": Out(8),
            "arsize": Out(3),
            "arburst": Out(2),
            "arvalid": Out(1),
            "arready": In(1),
            "rid": In(id_width),
            "rdata": In(data_width),
            "rresp": In(2),
            "rlast": In(1),
            "rvalid": In(1),
            "rready": Out(1),
        })

    @property
    def addr_width(self):
        """Bits of a byte address."""
        return self._addr_width

    @property
    def data_width(self):
        """Bits of a beat."""
        return self._data_width

    @property
    def id_width(self):
        """Bits of a transaction's id."""
        return self._id_width


class AXI4LiteSignature(wiring.Signature):
    """AXI4-Lite with 32-bit data (no prot).

    Parameters
    ----------
    addr_width : :class:`int`
        Bits of a byte address, 2 to 64.
    """

    def __init__(self, addr_width):
        if not isinstance(addr_width, int) or not 2 <= addr_width <= 64:
            raise ValueError(f"addr_width must be from 2 to 64, not {addr_width!r}")
        self._addr_width = addr_width
        super().__init__({
            "awaddr": Out(addr_width),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(32),
            "wstrb": Out(4),
            "wvalid": Out(1),
            "wready": In(1),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
            "araddr": Out(addr_width),
            "arvalid": Out(1),
            "arready": In(1),
            "rdata": In(32),
            "rresp": In(2),
            "rvalid": In(1),
            "rready": Out(1),
        })

    @property
    def addr_width(self):
        """Bits of a byte address."""
        return self._addr_width
