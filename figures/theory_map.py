"""Entropy change over p and S, with the border of peak and valley."""

from _publish import publish

if __name__ == "__main__":
    publish(["theory_map"], __doc__)
