"""The zoo's models against the device: what it can do of each, asked of the driver, and whether it
does that right.

* :mod:`~moeaccel.host.zoo.reference`: routers and experts in float, as their authors define them
* :mod:`~moeaccel.host.zoo.support`: what the device lacks for a model
* :mod:`~moeaccel.host.zoo.verify`: float, golden model and RTL side by side
"""
