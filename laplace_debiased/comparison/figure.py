"""The comparison's figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import sem
from torch import Tensor
from tueplots import axes, bundles, figsizes, fontsizes
from tueplots.constants.color import palettes

from laplace_debiased.comparison.experiment import MAP, PRIOR_PRECISIONS, Run
from laplace_debiased.comparison.report import group_by_estimator, reliabilities
