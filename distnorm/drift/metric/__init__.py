"""The drift measures as torchmetrics, for any training loop, on any number of ranks.

Every state is packed `Moments`, so that batches and ranks merge exactly, whatever their sizes. `compute` brings all
ranks together with one gather; torchmetrics' own way takes a barrier and two gathers a state. In a `MetricCollection`
pass what `update` takes by name: `collection.update(batch=x, mean=running_mean, var=running_var)`.
"""

from distnorm.drift.metric.base import AbstractMomentMetric as AbstractMomentMetric
from distnorm.drift.metric.batches import Divergence as Divergence
from distnorm.drift.metric.batches import NoiseScale as NoiseScale
from distnorm.drift.metric.batches import RunningAverage as RunningAverage
from distnorm.drift.metric.ranks import BetweenRanks as BetweenRanks
