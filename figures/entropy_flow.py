"""Predicted push on the entropy per class, and the measured change."""

from _publish import publish

if __name__ == "__main__":
    publish(["entropy_flow"], __doc__)
