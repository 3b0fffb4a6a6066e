"""N PyTorch models, one forward pass."""

from unisono import combine as combine
from unisono import plans as plans
from unisono.engine.inputs import per_member as per_member
from unisono.engine.planning.plan import OpRecord as OpRecord
from unisono.engine.planning.plan import Plan as Plan
from unisono.ensemble import Ensemble as Ensemble
from unisono.errors import CheckpointError as CheckpointError
from unisono.errors import EnsembleError as EnsembleError
from unisono.errors import EnsembleWarning as EnsembleWarning
from unisono.errors import IncompatibleMembersError as IncompatibleMembersError
from unisono.errors import MissingExtraError as MissingExtraError
from unisono.errors import UnsupportedModelError as UnsupportedModelError

__version__ = "0.1.0"
