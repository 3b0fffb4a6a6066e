"""N PyTorch models, one forward pass."""

from unisono import calibration as calibration
from unisono import combine as combine
from unisono import distributed as distributed
from unisono import optim as optim
from unisono import plans as plans
from unisono import selection as selection
from unisono import uncertainty as uncertainty
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
from unisono.evaluation.evaluate import evaluate as evaluate
from unisono.evaluation.result import Evaluation as Evaluation
from unisono.training import sampling as sampling
from unisono.training.clipping import clip_grad_norm_ as clip_grad_norm_
from unisono.training.clipping import clip_grad_value_ as clip_grad_value_
from unisono.training.fit import fit as fit
from unisono.training.history import History as History
from unisono.training.losses import member_losses as member_losses
from unisono.training.schedule import EpochEnd as EpochEnd

__version__ = "0.1.0"
