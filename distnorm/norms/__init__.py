"""The layers, one a file."""

from distnorm.norms.ghost import GhostBatchNorm as GhostBatchNorm
from distnorm.norms.sync import SyncBatchNorm as SyncBatchNorm
