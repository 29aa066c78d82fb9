"""Trainings with an average of the weights, as Lightning's callbacks keep it: what each step and evaluation has."""

import torch
from lightning.pytorch.callbacks import Callback

from distnorm.callbacks import EvaluationStatistics
from distnorm.population import own_running_stats
from tests.test_callbacks import Task, spec_of
from tests.test_callbacks import fit as fit_without

DECAY = 0.8
ORDERS = ("before", "after")


class Averaged(Task):
    """Keeps what each validation meets, and what training leaves after each step."""

    def __init__(self):
        super().__init__()
        self.met, self.steps, self.predicted = [], [], []

    def validation_step(self, batch, batch_idx):
        """Keep weights, statistics and, over this rank's samples, what they should be."""
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.met.append((weights_of(self.model), self.seen[-1], self.truth()))

    test_step = predict_step = validation_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """Keep weights and statistics as the step left them."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.steps.append((weights_of(self.model), own_running_stats(self.model)))

    predict_dataloader = Task.val_dataloader


def weights_of(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def fit(evaluation, averaging, order, task=None, folder=None, frozen_last=0.0, **options):
    """Train with an averaging callback listed before or after EvaluationStatistics."""
    task = Averaged() if task is None else task
    after = [averaging] if order == "after" and averaging else []
    if after:  # fit() lists its own after what it is given

        class Late(Callback):
            def on_fit_start(self, trainer, pl_module):
                """Was it listed so?"""
                kinds = [type(callback) for callback in trainer.callbacks]
                assert kinds.index(EvaluationStatistics) < kinds.index(type(averaging))

        task.configure_callbacks = lambda: [*after, Late()]
    given = [averaging] if order == "before" and averaging else []
    return fit_without(spec_of(evaluation, frozen_last), task, *given, folder=folder, **options)


def ema_of(values, decay=DECAY):
    """The average after each of the values, in float64."""
    averages = [values[0].double()]
    for value in values[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * value.double())
    return averages
