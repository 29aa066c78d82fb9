"""Numbers in few bytes, for a page: three decimal digits each, deflated, as text.

A number is sign · m · 10^(e + base) with 100 ≤ m ≤ 999 and 0 ≤ e ≤ 35, and its code 4 + (e · 900 + m - 100) · 2 + sign:
rising with the magnitude, below 2^16. Codes 0 to 3 are nan, 0, inf and -inf. What is 10^-36 of the largest is 0.
Each row is kept as it is or as differences to the number before, whatever takes less; low bytes come before high ones.

Legend: L rows, T columns.
"""

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DECADES = 36
_MANTISSAS = 900
_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)  # noise is smaller without matches
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(-200, 200)])


def pack(values_LT: ArrayLike) -> dict[str, Any]:
    """Pack numbers to three significant digits, nan and infinities kept.

    Returns:
        `shape`; `base`, the exponent of e = 0; `change`, whether differences are kept; `data`, base64 of the deflated
        planes.

    Example:
        >>> pack([1.0, 2.0])["shape"]
        [2]
    """
    values = np.asarray(values_LT, dtype=np.float64)
    base, codes = _codes(values)
    return {"base": base, **_pack_codes(codes.astype(np.uint16))}


def pack_whole(values_LT: ArrayLike) -> dict[str, Any]:
    """Pack whole numbers from -1 to 65534 exactly."""
    return _pack_codes((np.asarray(values_LT) + 1).astype(np.uint16))


def packed_bytes(values_LT: ArrayLike, *, is_whole: bool = False) -> float:
    """Estimate the bytes that `pack`, or `pack_whole`, makes of numbers, without deflating them."""
    values = np.asarray(values_LT)
    codes = (values + 1 if is_whole else _codes(values.astype(np.float64))[1]).astype(np.uint16)
    return min(_bits(codes), _bits(_changes(codes))) / 8 * 4 / 3


def _codes(values: NDArray[np.float64]) -> tuple[int, NDArray[np.int64]]:
    """Give the exponent of the smallest decade, and every value's code."""
    size = np.abs(np.where(np.isfinite(values), values, 0.0))
    is_some = size > 0
    exponent = np.zeros(values.shape, dtype=np.int64)
    exponent[is_some] = np.floor(np.log10(size[is_some])).astype(np.int64) - 2
    mantissa = _mantissa(size, exponent)
    for step, is_off in ((1, mantissa >= 1000), (-1, is_some & (mantissa < 100))):  # rounding, or log10, went over
        if is_off.any():
            exponent[is_off] += step
            mantissa[is_off] = _mantissa(size[is_off], exponent[is_off])
    base = int(exponent[is_some].max()) - _DECADES + 1 if is_some.any() else 0
    decade = exponent - base
    codes = 4 + (decade * _MANTISSAS + mantissa.astype(np.int64) - 100) * 2 + (values < 0)
    codes = np.where(is_some & (decade >= 0), codes, 1)
    codes = np.where(np.isposinf(values), 2, np.where(np.isneginf(values), 3, codes))
    return base, np.where(np.isnan(values), 0, codes)


def _mantissa(size: NDArray[np.float64], exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    """Round to three digits; 10^-326 is no float64, so that the power is taken in two halves."""
    half = exponent // 2
    return np.asarray(np.rint(size / _POWERS[half + 200] / _POWERS[exponent - half + 200]))


def _changes(codes: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Give the differences along rows, modulo 2^16, as numbers that are small either way: 0 -1 1 -2 … are 0 1 2 3 …"""
    changes = np.diff(codes, axis=-1, prepend=np.uint16(0))
    return np.asarray((changes << 1) ^ (np.uint16(0xFFFF) * (changes >> 15)))


def _pack_codes(codes: NDArray[np.uint16]) -> dict[str, Any]:
    changes = _changes(codes)
    use_changes = _bits(changes) < _bits(codes)
    chosen = (changes if use_changes else codes).astype("<u2")
    planes = chosen.reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes()
    data = base64.b64encode(min((_deflated(planes, how) for how in _STRATEGIES), key=len)).decode()
    return {"shape": list(codes.shape), "change": bool(use_changes), "data": data}


def _deflated(data: bytes, strategy: int) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return deflate.compress(data) + deflate.flush()


def _bits(codes: NDArray[np.uint16]) -> float:
    """Estimate the size by the entropy of the bytes of each plane."""
    bits = 0.0
    for plane in (codes & 0xFF, codes >> 8):
        counts = np.bincount(plane.reshape(-1).astype(np.int64), minlength=256)
        counts = counts[counts > 0]
        bits += float(-(counts * np.log2(counts / counts.sum())).sum())
    return bits
