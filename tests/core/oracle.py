"""A NumPy fp64 twin of estimates, rules and multipliers, written from the formulas and not from the code.

It keeps raw samples where the library keeps sums, loops where the library is vectorised, and weights windows
explicitly where the library recurses.
"""

from dataclasses import dataclass, field

import numpy as np

# ---- barriers: (value, multiplier) of one bound


def log_barrier(z, mu):
    return (-mu * np.log(-z), -mu / z) if z < 0 else (np.inf, np.inf)


def relaxed(extension, z, mu, s, order=4):
    if z <= -s:
        return log_barrier(z, mu)
    if extension == "linear":
        return -mu * np.log(s) + mu / s * (z + s), mu / s
    if extension == "quadratic":
        return -mu * np.log(s) + mu / 2 * (((z + 2 * s) / s) ** 2 - 1), mu * (z + 2 * s) / s**2
    if extension == "polynomial":
        k = order
        value = mu * ((k - 1) / k * (((-z - k * s) / ((k - 1) * s)) ** k - 1) - np.log(s))
        return value, mu / s * ((z + k * s) / ((k - 1) * s)) ** (k - 1)
    return mu * (np.exp(1 + z / s) - 1 - np.log(s)), mu / s * np.exp(1 + z / s)


def modified(z, mu, learned, beta=0.5):
    """Nash, Polyak and Sofer's quadratic extrapolation, in their variable tau = -z/mu."""
    tau = -z / mu
    if tau >= -beta:
        return -mu * learned * np.log(1 + tau), learned / (1 + tau)
    a = -1 / (1 - beta) ** 2
    b = (1 - 2 * beta) / (1 - beta) ** 2
    c = beta * (2 - 3 * beta) / (2 * (1 - beta) ** 2) + np.log(1 - beta)
    return -mu * learned * (a * tau**2 / 2 + b * tau + c), learned * (a * tau + b)


# ---- estimates


def group_variance_of_mean(values, groups=None):
    """Variance of the mean of dependent samples, from the spread of group sums; NaN for fewer than two groups."""
    values = np.asarray(values, float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    ids = np.unique(groups)
    if len(ids) < 2:
        return np.nan
    mean = values.mean()
    sums = np.array([(values[groups == g] - mean).sum() for g in ids])
    return len(ids) / (len(ids) - 1) * (sums**2).sum() / len(values) ** 2


def ema(windows, smoothing, groups=None):
    """Mean and standard error of a list of windows (lists of samples), by explicit weights."""
    n = len(windows)
    w = np.array([smoothing * (1 - smoothing) ** (n - 1 - i) for i in range(n)])
    x = np.array([np.mean(window) for window in windows])
    mean = (w * x).sum() / w.sum()
    v = np.array([group_variance_of_mean(win, None if groups is None else groups[i]) for i, win in enumerate(windows)])
    have = ~np.isnan(v)
    share = (w**2).sum() / w.sum() ** 2
    if (w[have] ** 2).sum() >= 0.5 * (w**2).sum():
        each = (w[have] ** 2 * v[have]).sum() / (w[have] ** 2).sum()
    elif n > 1 and smoothing < 1:
        each = (w * (x - mean) ** 2).sum() / w.sum() / (1 - share)
    else:
        return mean, np.nan
    return mean, np.sqrt(each * share)


# ---- the objective, for one constraint of sampled or exact values


@dataclass
class Twin:
    """A relaxed-barrier objective with an exponential schedule, one constraint, any bounds."""

    lower: float | None
    upper: float | None
    start: float
    end: float
    steps: int
    smoothing: float
    noise_floor: float
    extension: str = "linear"
    windows: list = field(default_factory=list)
    scale: float | None = None

    def commit(self, samples):
        self.windows.append(list(samples))
        if self.scale is None:
            if self.lower is not None and self.upper is not None:
                self.scale = self.upper - self.lower
            else:
                self.scale = np.std(samples, ddof=1)

    def multipliers(self):
        """{side: (z, mu, s, lambda)} for the next window."""
        mean, stderr = ema(self.windows, self.smoothing)
        t = min(len(self.windows), self.steps) / self.steps
        base = self.start * (self.end / self.start) ** t
        floor = self.noise_floor * (1.0 if np.isnan(stderr) else stderr / self.scale)
        mu = max(base, np.sqrt(floor))
        result = {}
        for side, bound, sign in (("lower", self.lower, -1), ("upper", self.upper, 1)):
            if bound is not None:
                z = sign * (mean - bound) / self.scale
                result[side] = (z, mu, mu**2, relaxed(self.extension, z, mu, mu**2)[1])
        return result
