"""Gradient norm over the steps."""

from _publish import publish

if __name__ == "__main__":
    publish(["gradient_norm"], __doc__)
