"""Gradient mass per probability bin and sign, exact and by proxy."""

from _publish import publish

if __name__ == "__main__":
    publish(["bin_mass"], __doc__)
