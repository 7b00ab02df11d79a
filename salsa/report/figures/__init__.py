"""The figures of a study. Each function takes (study, frames) and returns a Figure; `save` writes PNG and PDF.

An arm has one colour, marker and line style everywhere, so that nothing hangs on colour alone (and colours are safe
for colour-blind readers); an alpha that is no arm has the colour of its place in viridis. kl_coefs differ in size: the
larger, the larger the marker and the thicker the line. Bands and bars are named in the captions. What was not measured
is said in words in its place. Nothing is computed here but places on paper, and the means and intervals of what
`tables` has by replicate.
"""

from salsa.report.figures.captions import captions
from salsa.report.figures.curves import lengths_and_ends, over_optimisation, training_curves
from salsa.report.figures.forests import bradley_terry, claims, matched_kl, win_rates
from salsa.report.figures.planes import plane
from salsa.report.figures.points import alpha_curve, frontier, geometry, loss_line
from salsa.report.figures.style import LOOKS, drawn_kl_coefs, look, save

DRAWN = (
    claims,
    win_rates,
    bradley_terry,
    frontier,
    matched_kl,
    over_optimisation,
    alpha_curve,
    training_curves,
    lengths_and_ends,
    geometry,
    plane,
    loss_line,
)
NAMES = tuple(function.__name__ for function in DRAWN)

__all__ = ["DRAWN", "LOOKS", "NAMES", "captions", "drawn_kl_coefs", "look", "save"]
