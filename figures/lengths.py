"""Length, truncation, repetition, clipping, groups without a signal."""

from _publish import publish

if __name__ == "__main__":
    publish(["lengths"], __doc__)
