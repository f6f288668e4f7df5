"""Routers: which experts a token goes to, and with what weights.

``settings`` says what a router is, of ``choices``, once for golden model, hardware, driver and
documentation; ``flavours`` has the routers of published models; ``tables`` the integer functions
that golden model and hardware share. What a router computes is in :mod:`moeaccel.golden.router`
(the device's bits) and :mod:`moeaccel.golden.router_reference` (floats).
"""
