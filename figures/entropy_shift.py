"""Predicted and measured change of the entropy against p."""

from _publish import publish

if __name__ == "__main__":
    publish(["entropy_shift"], __doc__)
