"""Members over processes and machines, on `torch.distributed`.

Each rank holds a block of the members as an ordinary `unisono.Ensemble`, and trains it without a
word to the others. What all ranks need together, `unisono.combine`, `unisono.uncertainty` and
`unisono.evaluate` compute with ``mesh=``.
"""

from unisono.block import Block as Block
from unisono.distributed.gathering import gather as gather
from unisono.distributed.mesh import make_mesh as make_mesh
from unisono.distributed.sharding import build as build
from unisono.distributed.sharding import shard as shard
from unisono.distributed.synchronised import Synchronised as Synchronised
