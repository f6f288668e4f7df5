"""Memories of which nothing is used that is read while it is written."""

from amaranth.lib import memory

__all__ = ["unchecked_memory"]


def unchecked_memory(m, name, shape, depth):
    """Add a memory as submodule ``name`` and return its write and its read port.

    Synthesis need not build what a read of the address being written gives: nobody may use that.

    Parameters
    ----------
    m : :class:`Module`
    name : :class:`str`
    shape : shape
        Of a word.
    depth : :class:`int`
    """
    m.submodules[name] = storage = memory.Memory(
        shape=shape, depth=depth, init=[], attrs={"no_rw_check": 1})
    return storage.write_port(), storage.read_port()
