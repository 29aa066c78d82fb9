"""What several tests of the layers share: shards in every memory layout, and one training step on this rank's.

A shard travels to its rank contiguous, by name of a layout; the rank lays it out, since pickling keeps no strides.
"""

import torch

from distnorm import SyncBatchNorm, collectives

POSITIONS = {2: (), 3: (5,), 4: (3, 4), 5: (2, 3, 2)}
KEYS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x):
    return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()]) if x.dim() in _CHANNELS_LAST else x


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x):
    """Every second channel and position of something bigger."""
    bigger = x.repeat_interleave(2, 1)
    return bigger.repeat_interleave(2, -1)[:, ::2, ..., ::2] if x.dim() > 2 else bigger[:, ::2]


def expanded(x):
    """The first sample's first position, for all: no memory of its own."""
    return x[(slice(1), slice(None), *[slice(1)] * (x.dim() - 2))].expand_as(x) if len(x) else x


LAYOUTS = {"contiguous": torch.clone, "channels_last": channels_last, "transposed": transposed, "sliced": sliced}
GRAD_LAYOUTS = LAYOUTS | {"expanded": expanded}


def shards(sizes, shape, offset=0.0, dtype=torch.float64, channels=3, rectified=False, seed=7):
    """Inputs and output gradients a rank, weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def make(n):
        return torch.randn(n, channels, *shape, generator=generator, dtype=torch.float64)

    x = [make(n) * 2 for n in sizes]
    x = [((part.relu() if rectified else part) + offset).to(dtype) for part in x]
    dy = [make(n).to(dtype) for n in sizes]
    weight = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    return x, dy, weight, bias


def layer_with(weight, bias, **options):
    layer = SyncBatchNorm(weight.numel(), dtype=weight.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def results(layer, x, y):
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "tracked": int(layer.num_batches_tracked),
    }


def train(x, dy, weight, bias, layout="contiguous", dy_layout="contiguous", masks=None, **options):
    """Body: this rank's shard through a fresh layer, forward and backward."""
    rank = collectives.rank()
    layer = layer_with(weight, bias, **options)
    own = LAYOUTS[layout](x[rank]).detach().requires_grad_()
    y = layer(own) if masks is None else layer(own, mask=masks[rank])
    y.backward(GRAD_LAYOUTS[dy_layout](dy[rank]))
    return results(layer, own, y)


def train_all(x, dy, weight, bias, layouts):
    """Body: the same step, once a pair of layouts of input and output gradient."""
    return [train(x, dy, weight, bias, *pair) for pair in layouts]


def joined(found):
    """Ranks' results as one process would have them."""
    whole = {key: torch.cat([own[key] for own in found]) for key in ("y", "dx")}
    whole |= {key: sum(own[key] for own in found) for key in ("dweight", "dbias")}
    return whole | {key: found[0][key] for key in ("running_mean", "running_var")}
