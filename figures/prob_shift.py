"""Predicted and measured change of p against p."""

from _publish import publish

if __name__ == "__main__":
    publish(["prob_shift"], __doc__)
