"""The layers, one a file."""

from distnorm.norms.frozen import FrozenBatchNorm as FrozenBatchNorm
from distnorm.norms.ghost import GhostBatchNorm as GhostBatchNorm
from distnorm.norms.lstm import BatchNormLSTMCell as BatchNormLSTMCell
from distnorm.norms.recurrent import RecurrentBatchNorm as RecurrentBatchNorm
from distnorm.norms.renorm import BatchRenorm as BatchRenorm
from distnorm.norms.response import FilterResponseNorm as FilterResponseNorm
from distnorm.norms.response import ThresholdedLinearUnit as ThresholdedLinearUnit
from distnorm.norms.sync import SyncBatchNorm as SyncBatchNorm
from distnorm.norms.weight_norm import weight_normalize as weight_normalize
