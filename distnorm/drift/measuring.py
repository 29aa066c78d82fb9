"""From what the ranks' layers saw to the measures of the catalogue: on rank 0's host, in float64, all layers at once.

Layers whose ranks share statistics alike form one part: its channels lie one after the other, and every formula is
evaluated once for all of them. Windows keep what measures over time need: O(ranks × channels), whatever the run's
length.

Legend: R ranks, B blocks of ranks that share statistics, L layers, S channels of all layers of a part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distnorm.drift import averages, divergence, health, noise, summary
from distnorm.drift.capture import WatchedNorm
from distnorm.drift.catalogue import BY_KEY
from distnorm.drift.gathering import Caught
from distnorm.drift.windows import Window
from distnorm.moments import Moments

_FEWEST_TIMES = 5  # before anything is said of how a rank's numbers vary over time
_RANKS_WINDOW, _GAPS_WINDOW = 25, 10
_DIVERGENCES: dict[divergence.Kind, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "jeffreys": divergence.jeffreys,
    "kl": divergence.kl,
    "wasserstein": divergence.wasserstein,
    "bhattacharyya": divergence.bhattacharyya,
}


class Measurer:
    """Computes the measures of one step after the other.

    Args:
        norms: in the order of `Caught`.
        tier: `light` or `full`.
        num_ranks: R.
        pooled: whether evaluation pools the running averages of all ranks: together they hold more samples.
    """

    def __init__(self, norms: Sequence[WatchedNorm], tier: str, num_ranks: int, *, pooled: bool = False) -> None:
        self._channels = [norm.channels for norm in norms]
        self._tier = tier
        self._eps_S = summary.per_channel(
            [float(getattr(norm.layer, "eps", 0.0) or 0.0) for norm in norms], self._channels
        )
        self._running_S = summary.per_channel([norm.family != "sample" for norm in norms], self._channels)
        kinds: dict[tuple[tuple[tuple[int, ...], ...], bool], list[int]] = {}
        for index, norm in enumerate(norms):
            kinds.setdefault((norm.blocks(num_ranks), norm.family == "sample"), []).append(index)
        self._parts = [_Part(norms, indices, blocks, tier, pooled) for (blocks, _), indices in kinds.items()]
        self._ranks_over_time, self._noise = Window(_RANKS_WINDOW), Window(_RANKS_WINDOW)
        self._affine: tuple[Tensor, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: what measures over time have seen."""
        return {"windows": [window.state() for window in self._windows()], "affine": self._affine}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, of the same layers on as many ranks."""
        for window, kept in zip(self._windows(), state["windows"], strict=True):
            window.load(kept)
        self._affine = None if state["affine"] is None else tuple(state["affine"])

    def _windows(self) -> list[Window]:
        return [self._ranks_over_time, self._noise, *(window for part in self._parts for window in part.windows)]

    def measure(self, caught: Caught) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        """Compute all measures of a step: values by layer, and the worst channels; see `events.Measurement`."""
        by_channel: dict[str, Tensor] = {}
        worth_S = self._worth(caught)
        for part in self._parts:
            for key, of_part_S in part.measure(caught, worth_S[part.columns]).items():
                whole_S = by_channel.setdefault(key, caught.mean.new_full(caught.mean.shape[1:], torch.nan))
                whole_S[part.columns] = of_part_S
        if len(caught.mean) > 1:
            by_channel |= self._between_ranks(caught)
        by_layer = self._health(caught, by_channel.pop("infected"))
        values: dict[str, list[float]] = {key: value.tolist() for key, value in by_layer.items()}
        channels: dict[str, list[int]] = {}
        self._summarize(by_channel, values, channels)
        return values, channels

    def _summarize(
        self, by_channel: dict[str, Tensor], values: dict[str, list[float]], channels: dict[str, list[int]]
    ) -> None:
        """Median, 95th percentile, the worst channel of each measure; the worst is the smallest where less is worse."""
        if not by_channel:  # norms of samples have no past yet
            return
        sign = torch.tensor([-1.0 if BY_KEY[key].span < BY_KEY[key].healthy else 1.0 for key in by_channel])
        found = summary.summarize(torch.stack([*by_channel.values()]) * sign.unsqueeze(1), self._channels)
        medians, p95s, worst = (part * sign.unsqueeze(1) for part in found[:3])
        for row, key in enumerate(by_channel):
            values[key] = medians[row].tolist()
            if BY_KEY[key].over_channels:
                values |= {f"{key}.p95": p95s[row].tolist(), f"{key}.max": worst[row].tolist()}
                channels[key] = found.channel[row].tolist()

    def _worth(self, caught: Caught) -> Tensor:
        """Estimate how many samples one rank's batch is worth: from ranks in the same step, or the halves of a batch.

        Not from one step to the next: weights that move look like noise there.
        """
        count_RS = caught.count[:, summary.layer_of(self._channels)]
        var_S = caught.m2.sum(0) / count_RS.sum(0).clamp(min=1) + self._eps_S
        if len(caught.mean) == 1:
            self._noise.add(caught.apart.square() / var_S)
            over_time = self._noise.moments
            assert over_time is not None
            return torch.where(over_time.count < noise.FEWEST_TIMES, torch.nan, 1 / over_time.mean)
        means_RS = caught.mean.masked_fill(count_RS == 0, torch.nan)
        self._ranks_over_time.add((means_RS - means_RS.nanmean(0)) * var_S.rsqrt())
        residuals = self._ranks_over_time.moments
        assert residuals is not None
        worth_S = noise.effective_samples_of_ranks(residuals)
        return torch.where(residuals.count.amax(0) < noise.FEWEST_TIMES, torch.nan, worth_S)

    def _between_ranks(self, caught: Caught) -> dict[str, Tensor]:
        ranks = len(caught.mean)
        found: dict[str, Tensor] = {}
        over_time = self._ranks_over_time.moments
        if over_time is not None and float(over_time.count.max()) >= noise.FEWEST_TIMES:
            # Means that differ by less than 0.0001 σ differ by rounding.
            noisy = Moments(over_time.count, over_time.mean, over_time.m2 + over_time.count * 1e-8)
            found["between_ranks"] = noise.between_rank_ratio(noisy, common_removed=True)
        if any(len(part.blocks) > 1 for part in self._parts) and ranks > 1:
            spread_S = averages.rank_spread(caught.running_mean, caught.running_var + self._eps_S)
            for part in self._parts:
                if len(part.blocks) == 1:
                    spread_S[part.columns] = torch.nan
            found["rank_spread"] = spread_S
        return found

    def _health(self, caught: Caught, infected_S: Tensor) -> dict[str, Tensor]:
        weight_S, bias_S = caught.weight, caught.bias
        plain_S = weight_S.nan_to_num(1.0)
        var_S = torch.where(self._running_S, caught.running_var[0], torch.inf)
        medians_L = summary.summarize(plain_S.abs(), self._channels).median
        dead_S = health.dead_channels(plain_S, var_S, self._eps_S, medians_L[summary.layer_of(self._channels)])
        found = {
            "dead_channels": summary.share(dead_S, self._channels),
            "dead_relus": summary.share(health.dead_relus(weight_S, bias_S), self._channels),
            "non_finite": summary.total(infected_S, self._channels),
        }
        if self._tier == "full":
            if self._affine is not None:
                drifts = health.affine_drift((weight_S, bias_S), self._affine, self._channels)
                found |= dict(zip(("weight_drift", "bias_drift"), drifts, strict=True))
            self._affine = weight_S, bias_S
        return found


class _Part:
    """Layers whose ranks form the same blocks."""

    def __init__(
        self,
        norms: Sequence[WatchedNorm],
        indices: list[int],
        blocks: tuple[tuple[int, ...], ...],
        tier: str,
        pooled: bool,
    ) -> None:
        self._pooled = pooled
        self.blocks, self._indices = blocks, indices
        own = [norms[index] for index in indices]
        layer_of_S = summary.layer_of([norm.channels for norm in norms])
        self.columns = torch.cat([(layer_of_S == index).nonzero().squeeze(1) for index in indices])
        self._tier, self._of_samples = tier, own[0].family == "sample"
        self._channels = [norm.channels for norm in own]
        self._layer_of_S = summary.layer_of(self._channels)
        self._eps_S = summary.per_channel(
            [float(getattr(norm.layer, "eps", 0.0) or 0.0) for norm in own], self._channels
        )
        # A constant has no noise of its own, and neither has, in the end, a cumulative average.
        momenta = [getattr(norm.layer, "momentum", None) if norm.family == "running" else None for norm in own]
        self._momentum_S = summary.per_channel([float(momentum or 0.0) for momentum in momenta], self._channels)
        self._moves_S = summary.per_channel([norm.family == "running" for norm in own], self._channels)
        order = sorted((rank, block) for block, ranks in enumerate(blocks) for rank in ranks)
        self._block_of_R = torch.tensor([block for _, block in order])
        self._first_R = [block[0] for block in blocks]
        self._ranks_B1 = torch.tensor([[float(len(block))] for block in blocks])
        self._gaps, self._vars, self._past = Window(_GAPS_WINDOW), Window(_GAPS_WINDOW), Window(_RANKS_WINDOW)
        self.windows = self._gaps, self._vars, self._past
        self._floors: dict[tuple[float, ...], dict[divergence.Kind, Tensor]] = {}
        self._kinds = divergence.KINDS if tier == "full" else divergence.KINDS[:1]

    def measure(self, caught: Caught, worth_S: Tensor) -> dict[str, Tensor]:
        """Compute what each channel of the part measures, blocks averaged: [S] a measure.

        Args:
            caught: of all layers.
            worth_S: samples that one rank's batch is worth.
        """
        count_BS, samples_BL, mean_BS, var_BS = self._merged(caught)
        is_there_BS = count_BS > 0
        reference = self._reference(caught, mean_BS, var_BS, is_there_BS)
        found: dict[str, Tensor] = {"infected": self._infected(mean_BS, var_BS, reference, is_there_BS)}
        if reference is None:
            return found
        batch = mean_BS, (var_BS + self._eps_S).masked_fill(~is_there_BS, torch.nan)
        running = reference[0], reference[1] + self._eps_S
        for kind, floor_BS in self._floors_of(samples_BL).items():
            found[kind] = (_DIVERGENCES[kind](*batch, *running) - floor_BS).nanmean(0)
        if not self._of_samples:
            gap_BS = (mean_BS - running[0]) * running[1].rsqrt()
            self._gaps.add(gap_BS.masked_fill(~is_there_BS, torch.nan))
            self._vars.add(batch[1])
            found |= self._over_time(caught, count_BS, samples_BL, worth_S * self._ranks_B1)
        return found

    def _merged(self, caught: Caught) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merge the ranks of each block: counts, samples, means, biased variances."""
        columns, indices, block_of_R = self.columns, self._indices, self._block_of_R
        blocks = len(self.blocks)

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(blocks, values.shape[1]).index_add_(0, block_of_R, values)

        count_RS = caught.count[:, indices][:, self._layer_of_S]
        mean_RS, m2_RS = caught.mean[:, columns], caught.m2[:, columns]
        count_BS, samples_BL = summed(count_RS), summed(caught.samples[:, indices])
        divisor_BS = count_BS.clamp(min=1)
        mean_BS = summed(count_RS * mean_RS) / divisor_BS
        off_RS = mean_RS - mean_BS[block_of_R]
        var_BS = summed(m2_RS + count_RS * off_RS.square()) / divisor_BS
        return count_BS, samples_BL, mean_BS, var_BS

    def _reference(
        self, caught: Caught, mean_BS: Tensor, var_BS: Tensor, is_there_BS: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Give what the batch is compared with: running statistics, or of norms of samples their past; then take it in.

        The past's variance is that of all its values: of batches, and between them.
        """
        if not self._of_samples:
            return caught.running_mean[self._first_R][:, self.columns], caught.running_var[self._first_R][
                :, self.columns
            ]
        past = self._past.moments
        self._past.add(torch.stack((mean_BS, var_BS)).masked_fill(~is_there_BS, torch.nan))
        if past is None or float(past.count.max()) < _FEWEST_TIMES:
            return None
        times_BS = past.count[0]
        self._momentum_S = 2 / (times_BS[0] + 1)  # of which α / (2 - α) is 1 / T
        self._floors = {}
        return past.mean[0], past.mean[1] + past.m2[0] / times_BS.clamp(min=1)

    def _floors_of(self, samples_BL: Tensor) -> dict[divergence.Kind, Tensor]:
        """Find the noise floors [B, S]; samples and momenta seldom change."""
        key = tuple(samples_BL.flatten().tolist())
        if key not in self._floors:
            samples_BS = samples_BL[:, self._layer_of_S]
            pairs = torch.stack((samples_BS.flatten(), self._momentum_S.expand_as(samples_BS).flatten()))
            few, place = torch.unique(pairs, dim=1, return_inverse=True)
            floors = divergence.floors(few[0], few[1], self._kinds)
            self._floors = {key: {kind: floor[place].view_as(samples_BS) for kind, floor in floors.items()}}
        return self._floors[key]

    def _infected(
        self, mean_BS: Tensor, var_BS: Tensor, reference: tuple[Tensor, Tensor] | None, is_there_BS: Tensor
    ) -> Tensor:
        """Find channels whose statistics overflowed, of the batch or the running ones."""
        bad_BS = health.non_finite(mean_BS, var_BS) & is_there_BS
        if reference is not None and not self._of_samples:
            bad_BS = bad_BS | health.non_finite(*reference)
        return bad_BS.any(0).double()

    def _over_time(self, caught: Caught, count_BS: Tensor, samples_BL: Tensor, worth_BS: Tensor) -> dict[str, Tensor]:
        gaps, variances = self._gaps.moments, self._vars.moments
        assert gaps is not None
        assert variances is not None
        if float(gaps.count.max()) < _FEWEST_TIMES:
            return {}
        momentum_S = self._momentum_S
        lag_S = averages.lag(gaps, momentum_S).nanmean(0)
        found = {"lag": lag_S.masked_fill(~self._moves_S, torch.nan), "effective_samples": worth_BS.nanmean(0)}
        if self._tier == "full":
            found |= {
                "cv_mean": noise.cv_mean(worth_BS).nanmean(0),
                "cv_var": noise.cv_var(variances).nanmean(0),
                "design_effect": noise.design_effect(count_BS, worth_BS).nanmean(0),
                "estimator_sd": averages.estimator_sd(worth_BS, momentum_S).nanmean(0),
            }
            held_BS = averages.estimator_samples(samples_BL[:, self._layer_of_S], momentum_S)
            found["estimator_samples"] = held_BS.sum(0) if self._pooled else held_BS.nanmean(0)
            found |= self._analysis_of_variance(caught, count_BS, worth_BS) if len(caught.mean) > 1 else {}
        return found

    def _analysis_of_variance(self, caught: Caught, count_BS: Tensor, worth_BS: Tensor) -> dict[str, Tensor]:
        """Compare the ranks in this step, in units of the samples that a batch is worth: positions are no samples."""
        count_RS = caught.count[:, self._indices][:, self._layer_of_S]
        each_BS = (worth_BS / count_BS.clamp(min=1)).clamp(max=1).nan_to_num(1.0)  # what one value is worth
        each_RS = each_BS[self._block_of_R]
        units = Moments(count_RS * each_RS, caught.mean[:, self.columns], caught.m2[:, self.columns] * each_RS)
        return {"f": noise.f_statistic(units), "icc": noise.intraclass_correlation(units)}
