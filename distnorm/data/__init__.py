"""Embedded data sets and folders on disk, and the samplers that deal them to the ranks."""

from distnorm.data.digits import DigitsData as DigitsData
from distnorm.data.folder import ImageFolderData as ImageFolderData
from distnorm.data.module import AbstractClassificationData as AbstractClassificationData
from distnorm.data.sampler import EvaluationBatchSampler as EvaluationBatchSampler
from distnorm.data.sampler import GlobalBatchSampler as GlobalBatchSampler
