"""Check the formulas and the objectives numerically, on the user's own machine."""
