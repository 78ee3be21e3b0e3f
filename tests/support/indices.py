"""Indices that a slice of a tensor takes: all of numpy's but those with negative steps."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def indices(draw, shape):
    """An index of an array of `shape`: integers, slices that may end outside, None, an ellipsis, a list or a mask."""
    if shape and draw(st.integers(0, 9)) == 0:
        return np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape).astype(bool)
    key, axis, arrays = [], 0, draw(st.integers(0, 1))
    used = draw(st.integers(0, len(shape)))
    while axis < used:
        n = shape[axis]
        kind = draw(st.sampled_from(["slice", "slice", "none", "list", "mask", "integer"]))
        if kind == "none":
            key.append(None)
            continue
        axis += 1
        if kind == "integer" and n:
            key.append(draw(st.integers(-n, n - 1)))
        elif kind == "list" and n and arrays:
            key.append(draw(st.lists(st.integers(-n, n - 1), max_size=4)))
            arrays = 0
        elif kind == "mask" and arrays:
            key.append(draw(st.lists(st.booleans(), min_size=n, max_size=n)) if n else slice(None))
            arrays = 0
        else:
            end = st.none() | st.integers(-2 * n - 1, 2 * n + 1)
            key.append(slice(draw(end), draw(end), draw(st.none() | st.integers(1, 3))))
    if used < len(shape):
        key.append(Ellipsis)
        if draw(st.booleans()) and shape[-1]:
            key.append(draw(st.integers(-shape[-1], shape[-1] - 1)))
    return key[0] if len(key) == 1 and draw(st.booleans()) else tuple(key)
