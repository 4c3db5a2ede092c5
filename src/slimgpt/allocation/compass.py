"""Compass search: minimise a function without its derivatives.

References
----------
Kolda, Lewis & Torczon 2003, "Optimization by direct search: new perspectives on some classical and
modern methods", SIAM Review 45(3), section 1.
"""

from collections.abc import Callable, Sequence

Point = tuple[float, ...]


def compass_search(
    value: Callable[[Point], float], steps: Sequence[float], num_halvings: int, least_gain: float
) -> Point:
    """Minimise a function from the origin, one coordinate at a time.

    A step along a coordinate is tried in the direction that helped last, then in the other. It is
    kept if the value falls by `least_gain`, relative to the value before. When no coordinate helps,
    all steps are halved.

    Parameters
    ----------
    value : callable
        The function. Infinite values end the search soon, because no step helps any more.
    steps : sequence of float
        First step along each coordinate.
    num_halvings : int
        How often the steps are halved before the search ends.
    least_gain : float
        Smallest improvement that counts, so that noise does not.

    Returns
    -------
    tuple of float
        The best point.
    """
    point, directions = [0.0] * len(steps), [1.0] * len(steps)
    best, scale = value(tuple(point)), 1.0
    while scale >= 0.5**num_halvings:
        has_moved = False
        for axis, step in enumerate(steps):
            for direction in (directions[axis], -directions[axis]):
                trial = point.copy()
                trial[axis] += direction * scale * step
                found = value(tuple(trial))
                if found < best * (1 - least_gain):
                    point, best, has_moved = trial, found, True
                    directions[axis] = direction
                    break
        if not has_moved:
            scale /= 2
    return tuple(point)
