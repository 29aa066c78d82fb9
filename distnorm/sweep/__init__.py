"""Sweeps (`-m`): the jobs a command line multiplies out to, run one by one or as an array, and their results."""

from distnorm.sweep.conduct import conduct as conduct
from distnorm.sweep.jobs import plan as plan
