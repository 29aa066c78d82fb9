"""The benchmark runs from end to end, and what it compares is the same function."""

import json
import os
import re

import pytest
import torch
from torch import nn

from bench import drift, report, sync_batchnorm
from bench.layers import VARIANTS, with_norms
from bench.rows import FORMATS, all_rows, resnet50_norms
from bench.timing import Measurement, Spread
from distnorm import SyncBatchNorm, collectives
from distnorm.models.resnet import ResNet
from tests import ranks

pytestmark = pytest.mark.unit

SHAPE = (4, 6, 5, 3)


def test_quick_run_on_two_ranks_writes_every_field(tmp_path, capfd):
    path = tmp_path / "new" / "result.json"
    sync_batchnorm.main(["--quick", "--rows", "16x64x8x8 contiguous", "--json", str(path)])
    printed = capfd.readouterr().out
    assert "[1/1] 16x64x8x8 contiguous: ours to limit" in printed
    assert printed.count("HOLD") + printed.count("holds:") == 4
    assert printed.endswith(f"written to {path}\n")

    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert (content["environment"]["ranks"], content["environment"]["threads_a_rank"]) == (2, 1)
    assert content["environment"]["cpu"]
    (row,) = content["rows"]
    assert row["shape"] == [16, 64, 8, 8]
    assert row["repetitions"] == 3
    assert set(row["ms"]) == {"local", "limit", "ours", "naive"}
    assert set(row["ratios"]) == {"ours_to_limit", "naive_to_ours"}
    for spread in [*row["ms"].values(), *row["ratios"].values()]:
        assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
    assert content["geometric_means"]["layer"]["ours_to_limit"] == pytest.approx(
        row["ratios"]["ours_to_limit"]["median"]
    )
    assert [set(target) for target in content["targets"]] == [{"name", "value", "holds"}] * 4


def ends_badly(rank, *work):
    """Body: measures, keeps, and then, all ranks being done, the last is aborted as a thread of gloo's would."""
    end_ranks = collectives.end_ranks

    def end():
        end_ranks()
        if rank == 1:
            os.abort()

    collectives.end_ranks = end
    _run_rank(rank, *work)


def fails_early(rank, *work):
    raise ValueError("no memory left")


_run_rank = sync_batchnorm._run_rank


def test_a_rank_that_dies_at_its_end_costs_no_result(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sync_batchnorm, "_run_rank", ends_badly)
    path = tmp_path / "result.json"
    said = r"^1 of 1 rows were measured, and then:\nprocess 1 terminated with signal SIGABRT"
    with pytest.raises(SystemExit, match=said):
        sync_batchnorm.main(["--quick", "--rows", "16x64x8x8 contiguous", "--json", str(path)])
    assert f"written to {path}" in capfd.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_ranks_that_find_nothing_say_why_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sync_batchnorm, "_run_rank", fails_early)
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match=r"(?s)^0 of 1 rows were measured, and then:.*ValueError: no memory left"):
        sync_batchnorm.main(["--quick", "--rows", "16x64x8x8 contiguous", "--json", str(path)])
    assert not path.exists()


def test_a_filter_that_fits_no_row_names_the_rows():
    with pytest.raises(SystemExit, match=r"--rows '3x3' is in no row's name\. Rows: 2x64x112x112 contiguous, "):
        sync_batchnorm.main(["--rows", "3x3"])


def train_one_step(variant, x, dy, weight, bias, memory_format):
    """Body: this rank's half through one variant, forward and backward."""
    layer = VARIANTS[variant](x.shape[1])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    own, own_dy = (t.chunk(collectives.world_size())[collectives.rank()] for t in (x, dy))
    own = own.contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    y = layer(own)
    y.backward(own_dy.contiguous(memory_format=FORMATS[memory_format]))
    return outcome(layer, own, y)


def outcome(layer, x, y):
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "tracked": layer.num_batches_tracked,
    }


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("variant", ["ours", "naive"])
def test_variants_compute_batch_norm_of_the_joined_batch(variant, memory_format):
    x, dy = torch.randn(SHAPE) * 2 + 1, torch.randn(SHAPE)
    weight, bias = torch.rand(SHAPE[1]) + 0.5, torch.randn(SHAPE[1])
    whole = nn.BatchNorm2d(SHAPE[1])
    with torch.no_grad():
        whole.weight.copy_(weight)
        whole.bias.copy_(bias)
    joined = x.clone().requires_grad_()
    y = whole(joined)
    y.backward(dy)
    expected = outcome(whole, joined, y)

    found = ranks.run(train_one_step, variant, x, dy, weight, bias, memory_format, world=2)
    joined_found = {key: torch.cat([own[key] for own in found]) for key in ("y", "dx")}
    joined_found |= {key: sum(own[key] for own in found) for key in ("dweight", "dbias")}
    for key, value in joined_found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    for own in found:
        for key in ("running_mean", "running_var", "tracked"):
            torch.testing.assert_close(own[key], expected[key], rtol=1e-4, atol=1e-4)


def exchanges_of(variant):
    """Body: how many numbers each gather and sum of one forward and backward carries."""
    seen, gather, start_sum = [], collectives.gather, collectives.start_sum

    def counting_gather(values, *rest):
        seen.append(("gather", values.numel()))
        return gather(values, *rest)

    def counting_sum(values, *rest):
        seen.append(("sum", values.numel()))
        return start_sum(values, *rest)

    collectives.gather, collectives.start_sum = counting_gather, counting_sum
    try:
        layer = VARIANTS[variant](5)
        layer(torch.randn(2, 5, 3, 3, requires_grad=True)).sum().backward()
    finally:
        collectives.gather, collectives.start_sum = gather, start_sum
    return seen


def test_the_limit_exchanges_what_ours_does():
    ours, limit = ranks.run(exchanges_of, "ours", world=2), ranks.run(exchanges_of, "limit", world=2)
    assert ours == limit == [[("gather", 11), ("sum", 10)]] * 2


def test_resnet50_has_53_norms():
    norms = list(resnet50_norms(224))
    assert len(norms) == 53
    assert norms[0] == (64, 112, 112)
    assert norms[-1] == (2048, 7, 7)
    assert sum(channels for channels, _, _ in norms) == 26560


def test_swapping_replaces_every_norm():
    network = with_norms(ResNet(), "ours")
    norms = [m for m in network.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == 9
    assert all(type(m) is SyncBatchNorm for m in norms)


def measurement(kind, near, far):
    ratios = {"ours_to_limit": Spread(near - 0.1, near, near + 0.1), "naive_to_ours": Spread(far, far, far)}
    return Measurement("a row", kind, (2, 3, 4, 5), "contiguous", 3, 1, {}, ratios)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        ([measurement("layer", 1.0, 2.0), measurement("layer", 1.2, 2.1)], [True, True, True, True]),
        ([measurement("layer", 1.0, 1.0), measurement("layer", 1.3, 3.0)], [False, False, True, False]),
        ([measurement("layer", 1.0, 2.0), measurement("network", 1.6, 1.0)], [True, False, False, True]),
        ([measurement("network", 1.0, 3.0)], [False, True, True, False]),
    ],
)
def test_targets(found, holds):
    assert [target.holds for target in report.targets(found)] == holds
    printed = report.table(found)
    assert printed.count("DOES NOT HOLD") == holds.count(False)


def test_row_names_are_unique():
    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names) == 16


def test_the_monitor_is_timed_against_none_in_one_training(tmp_path, capfd):
    path = tmp_path / "drift.json"
    drift.main(["--quick", "--json", str(path)])
    printed = capfd.readouterr().out
    assert (
        len(re.findall(r"drift=(?:light|full ) / none  [\d.]+ [\d.]+ [\d.]+ · [\d.]+ .*at most 1\.0[28]", printed)) == 2
    )
    assert printed.endswith(f"written to {path}\n")
    content = json.loads(path.read_text())
    assert [kind for kind, _, _ in content["ms_a_step"]] == ["none", "light", "full", "light", "full", "none"]
    assert content["environment"]["ranks"] == 2
    assert content["limits"] == {"light": 1.02, "full": 1.08}
    took = {kind: wall for kind, wall, _ in content["ms_a_step"][3:]}
    for kind, (low, median, high) in content["ratios"]["wall_s"].items():
        assert low == median == high == pytest.approx(took[kind] / took["none"], rel=1e-3)
