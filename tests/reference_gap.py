"""A conv-norm-linear network in numpy, float64, with its statistics given: what the gap's tests compare with.

Legend: N samples, C channels, L positions.
"""

import numpy as np
import torch
from torch import nn

from distnorm import GhostBatchNorm, SyncBatchNorm

KINDS = {"batch": nn.BatchNorm2d, "sync": SyncBatchNorm, "ghost": lambda channels: GhostBatchNorm(channels, 2)}


def network(kind="batch", dropout=0.0):
    """Two norms, the second behind a 1 × 1 convolution and a ReLU; alike on all ranks; running statistics far off."""
    torch.manual_seed(1)
    model = nn.Sequential(
        KINDS[kind](3),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        KINDS[kind](4),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    for norm in (model[0], model[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


def batch_of(samples, rank=0):
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(samples, 3, 2, 3, generator=generator, dtype=torch.float64) * (1 + rank) + rank
    return inputs, torch.randint(3, (samples,), generator=generator)


def joined(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def normalized(norm, x_NCL, running, statistics, parts):
    """Normalize with given statistics, or each part of the samples with its own."""
    weight, bias = (p.detach().numpy()[:, None] for p in (norm.weight, norm.bias))
    if running:
        mean, var = (statistics[key].numpy()[:, None] for key in ("running_mean", "running_var"))
        return (x_NCL - mean) / np.sqrt(var + norm.eps) * weight + bias
    pieces = []
    for x in (piece for piece in np.split(x_NCL, parts) if len(piece)):
        mean, var = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
        pieces.append((x - mean) / np.sqrt(var + norm.eps) * weight + bias)
    return np.concatenate(pieces)


def loss_and_predictions(model, batch, running, statistics=None, parts=()):
    """Mean cross entropy, in numpy; `running` are the norms with evaluation statistics, `parts` where ghosts begin."""
    inputs, targets = (part.numpy() for part in batch)
    x_NCL = inputs.reshape(len(inputs), 3, 6)
    for index in ("0", "3"):
        norm = model[int(index)]
        own = {key: (statistics or {}).get(f"{index}.{key}", value) for key, value in norm.named_buffers()}
        x_NCL = normalized(norm, x_NCL, index in running, own, parts)
        if index == "0":
            kernel_OC = model[1].weight.detach().numpy()[:, :, 0, 0]
            x_NCL = np.maximum(np.einsum("oc,ncl->nol", kernel_OC, x_NCL) + model[1].bias.detach().numpy()[:, None], 0)
    logits = x_NCL.reshape(len(x_NCL), -1) @ model[6].weight.detach().numpy().T + model[6].bias.detach().numpy()
    logits = logits - logits.max(1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_softmax[np.arange(len(targets)), targets].mean(), logits.argmax(1)
