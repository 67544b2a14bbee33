from matplotlib import rc_context
from matplotlib.figure import Figure

from laplace_debiased.comparison.style import figure_style


def test_panels_get_higher_with_the_ratio():
    sizes = []
    for ratio in (0.5, 1.0):
        with rc_context(figure_style(2, ratio)):
            sizes.append(Figure().get_size_inches())
    (width, low), (same, high) = sizes
    assert width == same
    assert low < high
