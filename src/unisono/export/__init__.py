"""Take an ensemble to where it is deployed: ``torch.export``, ONNX, ahead-of-time packages.

Every export runs all members at once by the rules of the engine, for minibatches of any size. It
is the call without gradients, in the mode in which the ensemble is.
"""

from unisono.export.combined import CombinationName as CombinationName
from unisono.export.onnx_file import onnx as onnx
from unisono.export.package_file import package as package
from unisono.export.program import program as program
from unisono.export.report import Difference as Difference
from unisono.export.report import Export as Export
from unisono.export.report import Port as Port
