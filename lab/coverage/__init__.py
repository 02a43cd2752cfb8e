"""Which updates a method can reach on one d×d layer with n trained numbers (NOLA's Figure 2, and beyond).

Four measures of the set of reachable updates {ΔW(θ)} of a method with given settings:

- span: dimension of the smallest subspace that holds it, over d² the figure's "percentage coverage";
- local dimension: rank of the Jacobian θ → ΔW at a random θ, the true degrees of freedom (never above n);
- rank of one update, a matrix rank;
- approximation: the smallest relative error ‖T − ΔW‖/‖T‖ for a given target T.

The methods compared most have their equation as a NumPy map here (`maps`), because a page that is asked for a plot must
answer at once: importing torch and PEFT takes seconds on a free machine and half a minute on a busy one, and a curve
takes a tenth of a second. Every other row is measured on its own code (`_torch_maps`), in a process of its own.
Beyond d = 32 the page leaves them to the queue (lab/tasks/coverage.py). Points that took long are kept on the disk (`kept`).
Tests hold the maps against the methods' code. Settings for n parameters come from the row's own solver.
"""

from __future__ import annotations

from lab.coverage.closed import Closed, closed_form
from lab.coverage.curves import MAX_D, Question, curve, point
from lab.coverage.measure import TOLERANCE, Spectrum

__all__ = ["MAX_D", "TOLERANCE", "Closed", "Question", "Spectrum", "closed_form", "curve", "point"]
