"""GPTQ as the paper's algorithm 2 says it, in naive numpy float64."""

import ml_dtypes
import numpy as np
import oracle
import scipy.linalg


def paper_transform(m_w, m_x, damping):
    """WUSH with the library's choice of signs, rounded to bfloat16."""
    w, x = (np.linalg.cholesky(oracle.damp(m, damping)) for m in (m_w, m_x))
    u, s, _ = np.linalg.svd(w.T @ x)
    rows = u.T @ w.T
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    d = len(s)
    t = scipy.linalg.hadamard(d) / np.sqrt(d) @ (np.sign(largest) * rows / np.sqrt(s)[:, None])
    return t.astype(ml_dtypes.bfloat16).astype(np.float64)


def column_gptq(w, hessian, fmt, margins):
    """GPTQ of (d, n) on a Hessian (d, d), one column after the other, by the inverse Hessian."""
    inverse = np.linalg.inv(hessian)
    w, g = w.copy(), fmt.group_size
    codes, values = np.zeros(w.shape, int), np.zeros(w.shape)
    for c in range(len(w)):
        if c % g == 0:
            scale = oracle.RULES[fmt.rule](w[c : c + g].T, fmt.global_scale, fmt)[0]
        grid, grid_codes = oracle.element_grid(fmt.element)
        position, margin = oracle.round_to_grid(w[c] * fmt.global_scale / scale, fmt.element)
        margins.append(margin)
        codes[c], values[c] = grid_codes[position], grid[position] * scale / fmt.global_scale
        # Optimal brain surgeon: the columns not yet quantized absorb the error.
        w[c + 1 :] += np.outer(inverse[c + 1 :, c] / inverse[c, c], values[c] - w[c])
        inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes, values


def paper_gptq(w, h, fmt, transforms, damping=1e-2):
    """Algorithm 2: codes (N, K), its own transforms (K/d, d, d), the margins of all decisions.

    Weights go through the given transforms: one entry rounded the other way to bfloat16 changes
    the codes, and through them everything after, so both are compared block by block.
    """
    d = transforms.shape[-1]
    k, n = w.shape[1], w.shape[0]
    w = np.asarray(w, np.float64).T.copy()
    h = np.asarray(h, np.float64)
    lower = np.linalg.cholesky(np.linalg.inv(oracle.damp(h, damping)))
    codes, used, margins = np.zeros((k, n), int), [], []
    for start in range(0, k, d):
        i = slice(start, start + d)
        used.append(paper_transform(w[i] @ w[i].T / n, h[i, i], damping))
        t_x = transforms[start // d]
        t_w = np.linalg.inv(t_x).T
        conditional = np.linalg.inv(lower[i, i] @ lower[i, i].T)
        codes[i], hat = column_gptq(t_w @ w[i], t_x @ conditional @ t_x.T, fmt, margins)
        error = np.linalg.inv(t_w) @ hat - w[i]
        for later in range(start, k, d):
            j = slice(later, later + d)
            w[j] += lower[j, i] @ np.linalg.inv(lower[i, i]) @ error
    return codes.T, np.stack(used), np.stack(margins).T


def assert_same_codes(actual, codes, margins, tie=1e-5):
    """Each row agrees up to its first tie; what follows a tie may be anything."""
    different = actual != codes
    for row in np.nonzero(different.any(1))[0]:
        assert margins[row, : different[row].argmax() + 1].min() < tie
    assert different.any(1).mean() < 0.2
