"""The mathematics once more, in numpy float64, from the formulas and not from the library.

Slow and plain on purpose. Scales are a dictionary of functions by rule name; transforms follow the
equations of the WUSH paper with every choice (which square root, which decomposition) open.
"""

import ml_dtypes
import numpy as np
import scipy.linalg

# ------------------------------------------------------------------ elements

FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def float_grid(name):
    """Non-negative finite values, ascending: position = magnitude code."""
    bits = ml_dtypes.finfo(FLOATS[name]).bits
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(FLOATS[name]).astype(np.float64)
    return values[np.isfinite(values)]


def element_grid(element):
    """All values of an element, and the code of each, ascending by value."""
    if element.name in FLOATS:
        positive = float_grid(element.name)
        codes = np.arange(len(positive))
        values = np.concatenate([-positive[:0:-1], positive])
        return values, np.concatenate([codes[:0:-1] + (1 << (element.bits - 1)), codes])
    limit = 2 ** (element.bits - 1)
    if element.midrise:
        k = np.arange(-limit, limit)
        return k + 0.5, k % (2 * limit)
    k = np.arange(1 - limit - element.full, limit)
    return k.astype(np.float64), k % (2 * limit)


def round_to_grid(x, element):
    """Nearest value, ties to the even code; also how close the decision was.

    Returns positions into the grid, and the distance to the nearest decision boundary relative to
    the boundary's magnitude.
    """
    values, codes = element_grid(element)
    boundary = (values[1:] + values[:-1]) / 2
    position = np.searchsorted(boundary, x, side="left")  # a tie falls to the lower value
    at = np.minimum(position, len(boundary) - 1)
    tie = (x == boundary[at]) & (position < len(boundary))
    position = position + (tie & (codes[position] % 2 == 1))
    nearest = np.abs(x[..., None] - boundary) / np.maximum(np.abs(boundary), 1e-30)
    return position, nearest.min(-1)


# ------------------------------------------------------------------ scales


def floor_log2(x):
    """Exact, from the binary representation."""
    return np.frexp(x)[1] - 1


def e4m3(s):
    """Nearest positive E4M3 value, clipped to [2**-9, 448]."""
    return np.clip(s, 2.0**-9, 448.0).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def bfloat16(s):
    return s.astype(ml_dtypes.bfloat16).astype(np.float64)


def _rounded(s, fmt):
    return {"e4m3": e4m3, "bfloat16": bfloat16, "float32": lambda v: v}[fmt.scale_dtype](s)


def _pow2_div3(y, g, fmt):
    return [2.0 ** floor_log2(np.abs(y).max(-1))]


def _ocp_floor(y, g, fmt):
    """microxcaling: shared exponent = floor(log2 amax) - emax of the element."""
    return [2.0 ** (floor_log2(np.abs(y).max(-1)) - floor_log2(fmt.element.max))]


def _round_175(y, g, fmt):
    """compressed-tensors: add a quarter of the binade to the float32 bits, drop the mantissa."""
    bits = np.abs(y).max(-1).astype(np.float32).view(np.uint32)
    quarter = 1 << (23 - fmt.element.mantissa_bits - 1)
    power = ((bits + np.uint32(quarter)) & np.uint32(0x7F800000)).view(np.float32)
    return [power.astype(np.float64) / 2.0 ** floor_log2(fmt.element.max)]


def _ceil(y, g, fmt):
    """torchao: ceil(log2(amax / max))."""
    mantissa, exponent = np.frexp(np.abs(y).max(-1) / fmt.element.max)
    return [2.0 ** (exponent - (mantissa == 0.5))]


def _absmax(y, g, fmt):
    return [_rounded(g * np.abs(y).max(-1) / fmt.element.max, fmt)]


def _four_over_six(y, g, fmt):
    return [e4m3(g * np.abs(y).max(-1) / top) for top in (6.0, 4.0)]


def _three_candidates(y, g, fmt):
    six, four = _four_over_six(y, g, fmt)
    table = float_grid("e4m3")
    below = table[np.maximum(np.searchsorted(table, six) - 1, 1)]
    return [six, four, below]


def _signed(y, g, fmt, *tops):
    """The value of largest magnitude, of two the negative one, on -top."""
    negative = y.max(-1) > -y.min(-1)
    return [np.where(negative, -1, 1) * e4m3(g * np.abs(y).max(-1) / top) for top in tops]


def _signed_absmax(y, g, fmt):
    return _signed(y, g, fmt, 8.0)


def _signed_candidates(y, g, fmt):
    return _signed(y, g, fmt, 8.0, 8.5, 7.0)


def _gaussian_mse(y, g, fmt):
    step = 2.513930568578423 * 2 / 15
    return [_rounded(step * np.sqrt((y**2).mean(-1)), fmt)]


RULES = {
    "pow2_div3": _pow2_div3,
    "ocp_floor": _ocp_floor,
    "round_175": _round_175,
    "ceil": _ceil,
    "absmax": _absmax,
    "four_over_six": _four_over_six,
    "three_candidates": _three_candidates,
    "signed_absmax": _signed_absmax,
    "signed_candidates": _signed_candidates,
    "gaussian_mse": _gaussian_mse,
}


def quantize(y, fmt, g):
    """Quantize groups (n, g) float64: codes, scales, values, and which groups were decided.

    A group is undecided where float32 may honestly differ: a value within 1e-6 of the boundary
    between two codes (one float32 product is off by 1.2e-7), a scale within 2e-6 of the boundary
    between two scales (the sum of 32 squares adds its own roundings), or two candidates whose
    squared errors agree to 1e-5.
    """

    def rule(values):
        return np.stack(RULES[fmt.rule](values, g, fmt))

    scales = rule(y)
    decided = np.ones(len(y), bool)
    if fmt.scale_dtype != "e8m0":  # power-of-two scales are exact in float32: no allowance
        for sign in (-1, 1):
            decided &= (scales == rule(y * (1 + sign * 2e-6))).all(0)
    grid, grid_codes = element_grid(fmt.element)
    position, margin = round_to_grid(y * (g / scales)[..., None], fmt.element)
    values = grid[position] * (scales / g)[..., None]
    errors = ((y - values) ** 2).sum(-1)
    best = errors.argmin(0)  # the first on a tie
    chosen = np.take_along_axis(scales, best[None], 0)
    others = np.where(scales == chosen, np.inf, errors)  # one scale twice is one candidate
    decided &= (others - errors.min(0) > 1e-5 * errors.min(0)).all(0)
    # Zeros, and ties of exact products, are the same decision in any precision.
    exact = (y == 0) | ((margin == 0) & (fmt.scale_dtype == "e8m0"))
    tolerance = 0 if fmt.scale_dtype == "e8m0" and g == 1 else 1e-6
    decided &= (exact | (margin > tolerance)).all((0, 2))
    pick = (best, np.arange(len(y)))
    return grid_codes[position][pick], scales[pick], values[pick], decided


# ------------------------------------------------------------------ transforms


def cholesky_root(m):
    return np.linalg.cholesky(m)


def symmetric_root(m):
    s, u = np.linalg.eigh(m)
    return (u * np.sqrt(s)) @ u.T


def hadamard(d):
    return scipy.linalg.hadamard(d) / np.sqrt(d)


def damp(m, damping):
    return m + damping * np.mean(np.diag(m)) * np.eye(len(m))


def wush(m_w, m_x, *, root=cholesky_root, route="svd", h=None):
    """Equations 5-8, moments already damped: (T_X, T_W, S) of one block; ``h=None`` drops H."""
    w, x = root(m_w), root(m_x)
    if route == "svd":
        u, s, vt = np.linalg.svd(w.T @ x)
    else:  # W'^T M_X W' = U S^2 U^T; V^T = S^-1 U^T W'^T X'
        s2, u = np.linalg.eigh(w.T @ m_x @ w)
        s2, u = s2[::-1], u[:, ::-1]
        s = np.sqrt(s2)
        vt = (u / s).T @ (w.T @ x)
    h = np.eye(len(s)) if h is None else h
    return h @ (u / np.sqrt(s)).T @ w.T, h @ (vt.T / np.sqrt(s)).T @ x.T, s


def fp_loss(m_w, m_x, t_x, t_w):
    """E ||W'^T T_X^-1 diag(eta) T_X x||^2 per unit variance of eta: sum over channels."""
    a = np.diag(t_x @ m_x @ t_x.T)
    b = np.diag(t_w @ m_w @ t_w.T)
    return float(a @ b)


# ------------------------------------------------------------------ random material


def random_moment(rng, d, condition=1e3):
    """A positive definite (d, d) with a random basis and log-uniform eigenvalues."""
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    eigenvalues = np.logspace(0, -np.log10(condition), d)
    return (q * eigenvalues) @ q.T


def correlated(rng, rows, k, block, spread=2.0):
    """(rows, k) samples whose blocks have channels of very different power, mixed a little."""
    out = rng.standard_normal((rows, k))
    for start in range(0, k, block):
        mix = np.eye(block) + 0.3 * rng.standard_normal((block, block)) / np.sqrt(block)
        power = np.exp(spread * rng.standard_normal(block))
        part = slice(start, start + block)
        out[:, part] = (out[:, part] * power) @ mix
    return out
