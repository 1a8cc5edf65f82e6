"""Predicted against measured change of the entropy of every probed update."""

from _publish import publish

if __name__ == "__main__":
    publish(["calibration"], __doc__)
