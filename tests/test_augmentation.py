"""Streams and transforms: against their stated distributions and torch's own padding and mirroring."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from distnorm.data.augmentation import centre, flip_and_crop, shift_and_fade
from distnorm.data.stream import stream

pytestmark = pytest.mark.unit


def test_streams_of_different_purposes_never_start_alike():
    numbers = (0, 1, 2, 2**31, 2**32 - 2)
    triples = list(product(numbers, numbers, (None, *numbers)))
    first = {tuple(stream(*triple).integers(0, 2**63, size=2).tolist()) for triple in triples}
    assert len(first) == len(triples)
    assert stream(5, 6, 7).random() == stream(5, 6, 7).random()


def test_shift_and_fade_has_the_stated_places_contrast_brightness_and_noise():
    N = 3000
    ones = np.ones((N, 1, 8, 8), np.float32)
    faded = shift_and_fade(ones, (stream(0, 0, n) for n in range(N)))
    assert faded.dtype == np.float32
    assert faded.shape == (N, 1, 12, 12)
    places, contrast, brightness, noise = Counter(), [], [], []
    for image in faded[:, 0]:
        windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8)).sum((2, 3))
        top, left = np.unravel_index(windows.argmax(), windows.shape)
        inside = np.zeros((12, 12), bool)
        inside[top : top + 8, left : left + 8] = True
        places[int(top), int(left)] += 1
        contrast.append(image[inside].mean() - image[~inside].mean())
        brightness.append(image[~inside].mean())
        noise += [image[inside].std(ddof=1), image[~inside].std(ddof=1)]
    assert set(places) == set(product(range(5), range(5)))
    assert max(places.values()) < 2 * min(places.values())
    # uniform on 0.4 … 1 and 0 … 0.5, seen through the noise of 64 and 80 pixels' means
    assert np.mean(contrast) == pytest.approx(0.7, abs=0.02)
    assert np.var(contrast) == pytest.approx(0.6**2 / 12 + 0.04 / 64 + 0.04 / 80, rel=0.1)
    assert np.mean(brightness) == pytest.approx(0.25, abs=0.02)
    assert np.var(brightness) == pytest.approx(0.5**2 / 12 + 0.04 / 80, rel=0.1)
    assert np.mean(noise) == pytest.approx(0.2, rel=0.02)
    assert abs(np.corrcoef(contrast, brightness)[0, 1]) < 0.1


def test_flip_and_crop_gives_every_window_of_the_padded_image_and_its_mirror():
    image = torch.arange(1.0, 1 + 2 * 8 * 16).reshape(2, 8, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 1, 1))
    windows = {
        (top, left, flip): (torch.flip(window, (2,)) if flip else window).numpy().tobytes()
        for top, left, flip in product(range(3), range(5), (0, 1))
        for window in [padded[:, top : top + 8, left : left + 16].contiguous()]
    }
    images = np.repeat(image.numpy()[None], 1000, axis=0)
    seen = Counter(result.tobytes() for result in flip_and_crop(images, (stream(0, 0, n) for n in range(1000))))
    assert set(seen) == set(windows.values())
    assert len(windows) == 30


@pytest.mark.parametrize("transform", [shift_and_fade, centre, flip_and_crop])
def test_a_sample_looks_the_same_alone_and_in_a_batch_and_the_original_stays(transform):
    rng = np.random.default_rng(0)
    images = rng.random((6, 3, 8, 8), dtype=np.float32)
    before = images.copy()
    batch = transform(images, (stream(1, 2, n) for n in range(6)))
    alone = [transform(images[n : n + 1], [stream(1, 2, n)])[0] for n in (5, 3, 1)]
    assert [image.tobytes() for image in alone] == [batch[n].tobytes() for n in (5, 3, 1)]
    assert images.tobytes() == before.tobytes()
