"""Lightning modules, one a kind of task."""

from distnorm.tasks.classification import Classification as Classification
