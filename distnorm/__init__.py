"""Distributed training with the normalization batch you choose, on whatever devices you have."""

from distnorm.agreement import check_ranks as check_ranks
from distnorm.calibration import calibrate as calibrate
from distnorm.checkpoint import load as load
from distnorm.conversion import Conversion as Conversion
from distnorm.convert import convert as convert
from distnorm.errors import ConfigError as ConfigError
from distnorm.errors import DistNormError as DistNormError
from distnorm.errors import GroupError as GroupError
from distnorm.errors import ShapeError as ShapeError
from distnorm.fold import fold as fold
from distnorm.identity import identity_init as identity_init
from distnorm.moments import Moments as Moments
from distnorm.norms import GhostBatchNorm as GhostBatchNorm
from distnorm.norms import SyncBatchNorm as SyncBatchNorm
from distnorm.norms.surgery import register_norm as register_norm
from distnorm.policy import decide as decide
from distnorm.population import evaluation_statistics as evaluation_statistics
from distnorm.population import pool_running_stats as pool_running_stats
from distnorm.spec import NormSpec as NormSpec
from distnorm.uneven import EvenLoader as EvenLoader

__version__ = "0.1.0"
