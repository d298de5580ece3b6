"""Why a layer's experts could not be had."""

from __future__ import annotations

from isotherm.cluster.errors import IsothermError


class ExpertsLostError(IsothermError, ConnectionError):
    """Experts that a layer needs are held by no group that can be reached, and none was given them in time."""


class ExpertsFailedError(IsothermError, RuntimeError):
    """Every group that was asked to compute a layer's rows failed, after it was mended too: the rows are the reason."""
