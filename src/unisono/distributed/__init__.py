"""Members over processes and machines, on `torch.distributed`.

Each rank holds a block of the members as an ordinary `unisono.Ensemble`, and trains it without a
word to the others. What all ranks need together, `unisono.combine`, `unisono.uncertainty` and
`unisono.evaluate` compute with ``mesh=``.
"""

from unisono.block import Block as Block
from unisono.distributed.gathering import gather as gather
from unisono.distributed.loading import load as load
from unisono.distributed.loading import load_optimizer as load_optimizer
from unisono.distributed.mesh import make_mesh as make_mesh
from unisono.distributed.saving import Saving as Saving
from unisono.distributed.saving import async_save as async_save
from unisono.distributed.saving import save as save
from unisono.distributed.sharding import build as build
from unisono.distributed.sharding import shard as shard
from unisono.distributed.synchronised import Synchronised as Synchronised
