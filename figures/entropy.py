"""Entropy over the steps against its own beginning."""

from _publish import publish

if __name__ == "__main__":
    publish(["entropy"], __doc__)
