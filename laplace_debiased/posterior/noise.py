r"""The noise of a regression with the highest marginal likelihood.

Let each noise :math:`\sigma` have its own best prior precision. The slope of the log
marginal likelihood in :math:`\log \sigma` is then :math:`2 \ell / (\sigma^2 T) + \gamma
- N C`, with the loss :math:`\ell`, half of the sum of squared residuals, the
temperature T, N C targets and the effective number of parameters :math:`\gamma`
(MacKay, 1992). Both terms fall as the noise grows, so that there is one maximum. It is
not below the noise :math:`2 \ell / (N C T)` that the residuals alone tell, as
:math:`\gamma \geq 0`, and may be any number of times larger where there are more
parameters than targets.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log

from scipy.optimize import minimize_scalar

from laplace_debiased.rows.user_warnings import warn_user

_STEP, _MOST_STEPS = log(10), 20
_TOLERANCE = 1e-4


def best_noise(
    log_marginal_likelihood: Callable[[float], float], lowest: float
) -> float:
    """Find the noise with the highest marginal likelihood.

    Args:
        log_marginal_likelihood: That of a standard deviation of the noise, with one
            maximum in its logarithm.
        lowest: The smallest standard deviation.

    Returns:
        The standard deviation. If the marginal likelihood grows as far as it was
        followed, a warning says so.
    """

    def cost(log_factor: float) -> float:
        return -log_marginal_likelihood(lowest * exp(log_factor))

    costs = [cost(0.0), cost(_STEP)]
    while costs[-1] < costs[-2] and len(costs) <= _MOST_STEPS:
        costs.append(cost(_STEP * len(costs)))
    steps = len(costs) - 1
    if costs[-1] < costs[-2]:
        noise = lowest * exp(_STEP * steps)
        warn_user(
            f"The marginal likelihood still grows at the noise {noise:.3g}, "
            f"{_MOST_STEPS} powers of ten above that of the residuals, and the search "
            "ends there: set `sigma_noise`."
        )
        return noise
    bounds = _STEP * max(0, steps - 2), _STEP * steps
    found = minimize_scalar(
        cost, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE}
    )
    return lowest * exp(found.x)
