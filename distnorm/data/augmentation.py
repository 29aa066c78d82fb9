"""Transforms of images, a batch at a time, in numpy. What is random comes from each sample's own stream alone.

Every transform has the same signature, so that a data module may offer them by name. The streams may be made on demand:
a transform that needs none costs none.

Legend: N samples, C channels, H rows, W columns.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]
Transform = Callable[[Images, Iterable[np.random.Generator]], Images]
Domain = Callable[[Images], Images]

MARGIN = 2
CONTRAST = (0.4, 1.0)
BRIGHTNESS = (0.0, 0.5)
NOISE = 0.2


def shift_and_fade(images_NCHW: Images, streams: Iterable[np.random.Generator]) -> Images:
    """Make small images hard: another place, fainter, brighter, noisy.

        y = contrast · canvas + brightness + 0.2 · N(0, 1)

    The canvas is larger by 2 pixels on each side and the image lies anywhere on it (25 places, all equally likely).
    Contrast is uniform in 0.4 … 1 and brightness in 0 … 0.5, one value an image; the noise is drawn for every pixel.

    Args:
        images_NCHW: values in 0 … 1.
        streams: one a sample, in the order of the samples.

    Shape: images [N, C, H, W]; result [N, C, H + 4, W + 4]. N may be 0.
    """
    N, _, H, W = images_NCHW.shape
    canvas_NCHW = _canvas(images_NCHW)
    noise_NCHW = np.empty_like(canvas_NCHW)
    place_N2, uniform_N2 = np.empty((N, 2), np.int64), np.empty((N, 2))
    for n, rng in enumerate(streams):
        place_N2[n] = rng.integers(0, 2 * MARGIN + 1, size=2)
        rng.random(out=uniform_N2[n])
        rng.standard_normal(dtype=np.float32, out=noise_NCHW[n])
    for n, (top, left) in enumerate(place_N2):
        canvas_NCHW[n, :, top : top + H, left : left + W] = images_NCHW[n]
    low_2, high_2 = np.array([CONTRAST, BRIGHTNESS]).T
    contrast_N111, brightness_N111 = (low_2 + (high_2 - low_2) * uniform_N2).astype(np.float32).T[..., None, None, None]
    faded_NCHW: Images = canvas_NCHW * contrast_N111 + brightness_N111
    return faded_NCHW + np.float32(NOISE) * noise_NCHW


def centre(images_NCHW: Images, _streams: Iterable[np.random.Generator]) -> Images:
    """Put the images, untouched, in the middle of the canvas that `shift_and_fade` uses.

    Args:
        images_NCHW: values in 0 … 1.
        _streams: not read.

    Shape: images [N, C, H, W]; result [N, C, H + 4, W + 4]. N may be 0.
    """
    canvas_NCHW = _canvas(images_NCHW)
    canvas_NCHW[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN] = images_NCHW
    return canvas_NCHW


def in_domain(images_NCHW: Images, streams: Iterable[np.random.Generator], *, first: Transform, then: Domain) -> Images:
    """Transform images, and show the result as another camera would: the same samples, another domain.

    Args:
        images_NCHW: values in 0 … 1.
        streams: one a sample, in the order of the samples.
        first: the transform.
        then: what the other camera does to every pixel.

    Shape: images [N, C, H, W]; result as of `first`.
    """
    return then(first(images_NCHW, streams))


def invert(images_NCHW: Images) -> Images:
    """Exchange black and white: 1 - x. Shape: images [N, C, H, W]; result the same."""
    return 1 - images_NCHW


def flatten_contrast(images_NCHW: Images) -> Images:
    """Lower the contrast to a quarter: x / 4. Shape: images [N, C, H, W]; result the same."""
    return images_NCHW * np.float32(0.25)


def brighten(images_NCHW: Images) -> Images:
    """Make every pixel brighter by the range of clean images: x + 1. Shape: images [N, C, H, W]; result the same."""
    return images_NCHW + 1


def flip_and_crop(images_NCHW: Images, streams: Iterable[np.random.Generator]) -> Images:
    """Mirror left and right in half of the cases, and cut a window of the old size out of the zero-padded image.

    The padding is an eighth of the height and width on each side; every window is equally likely. Zero is the mean
    colour of standardised images.

    Args:
        images_NCHW: standardised images.
        streams: one a sample, in the order of the samples.

    Shape: images [N, C, H, W]; result the same. N may be 0.
    """
    H, W = images_NCHW.shape[2:]
    pad_H, pad_W = H // 8, W // 8
    padded_NCHW = np.pad(images_NCHW, ((0, 0), (0, 0), (pad_H, pad_H), (pad_W, pad_W)))
    result_NCHW = np.empty_like(images_NCHW)
    for n, rng in enumerate(streams):
        flip, top, left = rng.integers(0, (2, 2 * pad_H + 1, 2 * pad_W + 1))
        window_CHW = padded_NCHW[n, :, top : top + H, left : left + W]
        result_NCHW[n] = window_CHW[:, :, ::-1] if flip else window_CHW
    return result_NCHW


def keep(images_NCHW: Images, _streams: Iterable[np.random.Generator]) -> Images:
    """Change nothing.

    Args:
        images_NCHW: any images.
        _streams: not read.

    Shape: images [N, C, H, W]; result the same.
    """
    return images_NCHW


def _canvas(images_NCHW: Images) -> Images:
    N, C, H, W = images_NCHW.shape
    return np.zeros((N, C, H + 2 * MARGIN, W + 2 * MARGIN), np.float32)
