"""Decision trees of a few questions, as a configuration states them, and what a model says with one."""

import numpy as np


def make_question(name, *answers, asked_after=()):
    """A question whose vote columns are named after it and its answers."""
    return {
        "name": name,
        "asked_after": list(asked_after),
        "answers": [{"name": answer, "vote_column": f"{name}_{answer}"} for answer in answers],
    }


SMOOTH = make_question("smooth", "yes", "no")
BAR = make_question("bar", "yes", "no", asked_after=["smooth_no"])
# Its vote columns are not named after it: they go on with those of the bar.
STRENGTH = {**make_question("bar", "weak", "strong", asked_after=["bar_yes"]), "name": "strength"}

# Smooth galaxies are asked nothing more; featured ones whether they have a bar, and barred ones how strong it is.
TREE = {"name": "small", "questions": [SMOOTH, BAR, STRENGTH]}
# smooth yes, no; bar yes, no; weak, strong
CONCENTRATIONS = np.array([[2, 8, 9, 3, 6, 2], [9, 1, 5, 5, 1, 3], [4, 6, 2, 6, 5, 5]], dtype=np.float32)
