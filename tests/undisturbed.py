"""All that a look at a model must leave as it was, to be taken before and compared after."""

import random

import numpy as np
import torch

from distnorm.norms.base import OF_ONE_STEP


def fingerprint(model):
    """Values, identities, storages, versions, modes, attributes, hooks, gradients and random streams."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.named_modules())
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "identities": {name: (id(t), t.data_ptr(), t._version, t.requires_grad) for name, t in tensors},
        "gradients": {k: (id(p.grad), p.grad.clone()) for k, p in model.named_parameters() if p.grad is not None},
        "attributes": {
            name: {k: v for k, v in vars(module).items() if k[0] != "_" or k in OF_ONE_STEP} for name, module in modules
        },
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules},
        "streams": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()),
    }


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
