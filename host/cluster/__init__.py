"""Experts of a layer on several devices: in this process, or each with an actor of Ray.

``shard`` is what a device does for a cluster; ``actors`` puts that into Ray's actors; ``cluster``
deals experts to shards and chooses the grid; ``layer`` is the call and the sum, and what happens
when a shard is lost; ``router`` lets one shard say where x goes, for layers that route.

Every shard sums on the same grid, which is chosen once from the weights of all experts. A shard's
y is its part of the sum as float32: exactly, where that part is below 2^24 units of the grid. The
parts are added as integers and rounded once, so y has the bits that one device would give with
that grid, whoever has which expert. A larger part was rounded to 24 bits before: y may then be
off by half a unit of that part's last place, and ``layer.last.rounded`` counts such elements.
Typical outputs have 25 to 27 bits on the chosen grid, so that float32 sums lose nothing that
matters; where the same bits matter, ``coarser=6`` leaves typical parts 19 to 21, and a single
device with that ``grid_exponent`` gives the same.

Dealt by rows, each shard has a block of every expert's hidden rows: y is that of one device whose
layer was loaded with as many ``row_blocks``, since each block is rounded by itself.
"""

from moeaccel.host.cluster.actors import ray_cluster
from moeaccel.host.cluster.cluster import Cluster
from moeaccel.host.cluster.layer import ClusterExperts, ClusterStatistics
from moeaccel.host.cluster.router import ClusterMoe

__all__ = ["Cluster", "ClusterExperts", "ClusterMoe", "ClusterStatistics", "ray_cluster"]
