"""The report's packing: numbers in few bytes, decoded here by the format's description, one at a time."""

import base64
import dataclasses
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distnorm.drift.catalogue import BY_KEY
from distnorm.drift.events import Snapshot
from distnorm.drift.report.pack import pack, pack_whole, packed_bytes
from distnorm.drift.report.payload import payload, thinned
from distnorm.drift.report.worst import badness
from tests.histories import history

pytestmark = pytest.mark.unit

SHAPES = arrays.array_shapes(min_dims=1, max_dims=2, max_side=12)


def unpacked(packed):
    """The codes and numbers, by the format that pack.py describes, one at a time."""
    planes = zlib.decompress(base64.b64decode(packed["data"]))
    count = len(planes) // 2
    stored = [planes[i] + 256 * planes[count + i] for i in range(count)]
    columns, codes = packed["shape"][-1], []
    if not packed["change"]:
        return stored
    for place, code in enumerate(stored):
        step = code // 2 if code % 2 == 0 else -(code + 1) // 2
        codes.append(((codes[-1] if place % columns else 0) + step) % 65536)
    return codes


def value_of(code, base):
    if code < 4:
        return [math.nan, 0.0, math.inf, -math.inf][code]
    rest, sign = divmod(code - 4, 2)
    decade, mantissa = divmod(rest, 900)
    return float(f"{'-' if sign else ''}{mantissa + 100}e{decade + base}")


@settings(deadline=None, max_examples=150)
@given(arrays.arrays(np.float64, SHAPES, elements=st.floats(-1e12, 1e12) | st.sampled_from([np.nan, np.inf, -np.inf])))
def test_packed_numbers_keep_three_digits(values):
    packed = pack(values)
    assert packed["shape"] == list(values.shape)
    largest = np.abs(values[np.isfinite(values)]).max(initial=0)
    for value, code in zip(values.reshape(-1), unpacked(packed), strict=True):
        found = value_of(code, packed["base"])
        if not math.isfinite(value):
            assert found == value or (math.isnan(found) and math.isnan(value))
        elif abs(value) < largest * 1e-34:
            assert found == 0 or found == pytest.approx(value, rel=6e-3)
        else:
            last_digit = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 0
            assert abs(found - value) <= 0.5001 * last_digit


@pytest.mark.parametrize("scale", [1e-300, 1e-5, 1.0, 1e300])
def test_packing_takes_any_magnitude(scale):
    values = np.array([1.0, 2.345, 9.996, -0.01]) * scale
    packed = pack(values)
    found = [value_of(code, packed["base"]) for code in unpacked(packed)]
    assert found == pytest.approx(np.array([1, 2.345, 10, -0.01]) * scale, rel=3e-3)


@settings(deadline=None, max_examples=80)
@given(arrays.arrays(np.int64, SHAPES, elements=st.integers(-1, 65534)))
def test_packed_whole_numbers_are_exact(values):
    assert [code - 1 for code in unpacked(pack_whole(values))] == values.reshape(-1).tolist()


def test_the_estimate_of_the_size_is_near():
    random = np.random.default_rng(0)
    for values in (np.exp(0.2 * random.normal(size=(50, 2000))), np.cumsum(random.normal(size=(50, 2000)), 1)):
        assert packed_bytes(values) == pytest.approx(len(pack(values)["data"]), rel=0.08)


def test_smooth_rows_take_less_than_noisy_ones():
    smooth = 5 + np.sin(np.linspace(0, 3, 400)) * np.ones((20, 1))
    assert len(pack(smooth)["data"]) < len(pack(np.random.default_rng(0).permuted(smooth, axis=1))["data"]) / 2


@given(
    arrays.arrays(np.float64, (3, 11), elements=st.floats(0, 9) | st.just(np.nan)), st.integers(1, 13), st.booleans()
)
def test_thinning_keeps_the_worst(values, k, is_low_bad):
    kept, picked = thinned(values, badness(values, BY_KEY["effective_samples" if is_low_bad else "lag"]), k)
    for row in range(3):
        for column in range(math.ceil(11 / k)):
            block = values[row, column * k : (column + 1) * k]
            known = block[~np.isnan(block)]
            if len(known):
                assert (
                    kept[row, column]
                    == (known.min() if is_low_bad else known.max())
                    == values[row, picked[row, column]]
                )
            else:
                assert np.isnan(kept[row, column])


def test_the_worst_survives_where_several_measurements_share_a_column(monkeypatch):
    monkeypatch.setattr("distnorm.drift.report.payload.MOST_BYTES", 40_000)
    run = history(layers=5)
    found = payload([run])
    medians, others = found["thinned"]
    assert others > medians >= 1
    plane = found["runs"][0]["planes"]["jeffreys.max"]
    values = [value_of(code, plane["base"]) for code in unpacked(plane)]
    assert max(values) == pytest.approx(run.values["jeffreys.max"].max(), rel=5e-3)


def test_a_snapshot_of_chosen_channels_keeps_their_numbers():
    run = history(layers=1, steps=200, keys=["lag"])
    chosen = {"channel": [3, 1200, 2047], "running_mean": [1.0, 2.0, 3.0], "batch_mean": [1.0, 2.0, 4.0]}
    run = dataclasses.replace(run, snapshots=(Snapshot(200, {"layers.0.bn1": chosen}),))
    (found,) = payload([run])["runs"][0]["snapshots"]
    assert found["parts"]["layers.0.bn1"] == {"running_mean": [0, 3], "batch_mean": [3, 3], "channel": [3, 1200, 2047]}
    assert [value_of(code, found["packed"]["base"]) for code in unpacked(found["packed"])] == [1, 2, 3, 1, 2, 4]
