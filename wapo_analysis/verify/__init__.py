"""Numerical proof of the formulas and of the objectives, on the user's own machine."""
