"""The controller's view of the experts' load: rows per (MoE layer, expert), from the counters of the shards, and what
to expect next. Pure.

Shape suffixes: W windows, the latest last; L MoE layers; E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

# Seconds after which a shard that no longer reports is forgotten; one that missed a turn goes on counting from where it
# was
FORGET = 300.0
LEAST_SPREAD = 1e-4  # variance of log loads that is always allowed for


class LoadView:
    """Rows per second, decayed, and rows of the last windows. Times are in seconds and never go back.

    What a shard reports first is its zero: rows from before that, as those of days where the controller was restarted
    and one shard missed the first look, are not of now.
    """

    def __init__(self, layers: int, experts: int, half_life: float = 10.0, window: float = 5.0, keep: int = 24):
        """`window`: seconds; `keep`: how many closed windows are kept."""
        if half_life <= 0 or window <= 0:
            raise ValueError(f"half_life is {half_life} s and window {window} s; both must be positive")
        self.half_life, self.window = half_life, window
        self._shape = layers, experts
        self._counts: dict[str, np.ndarray] = {}
        self._reported: dict[str, float] = {}
        self._at: float | None = None  # when counters were last observed
        self._rate_LE = np.zeros(self._shape)  # since the view began at zero, it is too low by the factor _weight
        self._weight = 0.0
        self._open_LE, self._opened = np.zeros(self._shape), 0.0
        self._closed: deque[np.ndarray] = deque(maxlen=keep)

    def observe(self, counts: Mapping[str, np.ndarray], now: float) -> None:
        """`counts`: rows that each shard has routed since it started, int64 [layers, experts], by the shard's name. One
        whose counters have gone back was restarted, and counts from zero. Raises ValueError at counters of another
        shape."""
        rows_LE = np.zeros(self._shape)
        for name, count_LE in counts.items():
            if count_LE.shape != self._shape:
                raise ValueError(f"{name} counts rows of shape {count_LE.shape}; the model's is {self._shape}")
            rows_LE += self._since_last(name, count_LE)
            self._counts[name], self._reported[name] = count_LE.copy(), now
        for name in [name for name, at in self._reported.items() if now - at > FORGET]:
            del self._counts[name], self._reported[name]
        if self._at is None:
            self._opened = now
        else:
            self._add(rows_LE, now - self._at)
            self._close_window(now)
        self._at = now

    def _since_last(self, name: str, count_LE: np.ndarray) -> np.ndarray:
        before_LE = self._counts.get(name)
        if before_LE is None:
            return np.zeros(self._shape)
        if (count_LE < before_LE).any():
            return count_LE
        rows_LE: np.ndarray = count_LE - before_LE
        return rows_LE

    def _add(self, rows_LE: np.ndarray, seconds: float) -> None:
        self._open_LE += rows_LE
        if seconds > 0:
            fade = 0.5 ** (seconds / self.half_life)
            self._rate_LE = self._rate_LE * fade + rows_LE / seconds * (1 - fade)
            self._weight = self._weight * fade + (1 - fade)

    def _close_window(self, now: float) -> None:
        if now - self._opened >= self.window:
            self._closed.append(self._open_LE)
            self._open_LE, self._opened = np.zeros(self._shape), now

    def rates(self, now: float) -> np.ndarray:
        """Rows per second, float64 [L, E]: the mean over the past, in which what is one half-life older counts half."""
        if self._at is None or self._weight == 0:
            return np.zeros(self._shape)
        rates_LE: np.ndarray = self._rate_LE / self._weight * 0.5 ** (max(0.0, now - self._at) / self.half_life)
        return rates_LE

    def windows(self) -> np.ndarray:
        """Rows in each of the last closed windows, float64 [W, L, E]; W is 0 until the first one closes."""
        return np.stack(self._closed) if self._closed else np.zeros((0, *self._shape))


def predict(history_WLE: np.ndarray, prior: float = 0.95, prior_weight: float = 100.0) -> np.ndarray:
    """Rows expected in the window after these, float64 [L, E]; each layer has as many in all as in the last window.

    Log loads, less their mean in the layer, are taken for an AR(1) process that is seen through counting noise, and
    followed with a scalar Kalman filter (Kalman 1960) for each expert: y' = ρ y + ε, var ε = (1 - ρ²) s². A count of n
    has log(n + ½), with the Poisson variance 1 / (n + ½) as its noise. s² and ρ, the persistence, are estimated from
    all windows together by the moments of the Poisson-lognormal distribution (Aitchison & Ho 1989), ρ with a prior
    `prior` that weighs as much as `prior_weight` pairs. So a well counted expert keeps most of what it had last, and
    what a few rows seem to say is drawn towards the mean of its past and of its layer.
    """
    history_WLE = np.asarray(history_WLE, dtype=np.float64)
    if history_WLE.ndim != 3 or not len(history_WLE):
        raise ValueError(
            f"history has shape {history_WLE.shape}; it must be [windows, layers, experts] with at least one window"
        )
    seen_WLE = np.log(history_WLE + 0.5)
    seen_WLE -= seen_WLE.mean(axis=2, keepdims=True)
    noise_WLE = 1 / (history_WLE + 0.5)
    rho, spread = _persistence(history_WLE, prior, prior_weight)
    level_LE, variance_LE = np.zeros(history_WLE.shape[1:]), np.full(history_WLE.shape[1:], spread)
    for seen_LE, noise_LE in zip(seen_WLE, noise_WLE, strict=True):
        trust_LE = variance_LE / (variance_LE + noise_LE)
        level_LE = rho * (level_LE + trust_LE * (seen_LE - level_LE))
        variance_LE = rho**2 * (1 - trust_LE) * variance_LE + (1 - rho**2) * spread
    share_LE = np.exp(level_LE)
    rows_LE: np.ndarray = share_LE / share_LE.sum(axis=1, keepdims=True) * history_WLE[-1].sum(axis=1, keepdims=True)
    return rows_LE


def _persistence(history_WLE: np.ndarray, prior: float, prior_weight: float) -> tuple[float, float]:
    """ρ, and s², the variance of the log loads: E[n (n - 1)] = m² exp(s²), and with n' one window later E[n n'] = m m'
    exp(ρ s²)."""
    mean_WL1 = history_WLE.mean(axis=2, keepdims=True)
    counted_WL = mean_WL1[..., 0] > 0
    share_WLE = history_WLE / np.where(mean_WL1 > 0, mean_WL1, 1.0)
    pairs_WL = counted_WL[:-1] & counted_WL[1:]
    if not counted_WL.any():
        return prior, LEAST_SPREAD
    spread = max(
        LEAST_SPREAD, _log((share_WLE**2 - share_WLE / np.where(mean_WL1 > 0, mean_WL1, 1.0))[counted_WL].mean())
    )
    together = _log((share_WLE[:-1] * share_WLE[1:])[pairs_WL].mean()) if pairs_WL.any() else 0.0
    pairs = int(pairs_WL.sum()) * history_WLE.shape[2]
    rho = (pairs * together / spread + prior_weight * prior) / (pairs + prior_weight)
    return min(max(rho, 0.0), 0.999), spread


def _log(x: float) -> float:
    return float(np.log(max(x, 1e-9)))
