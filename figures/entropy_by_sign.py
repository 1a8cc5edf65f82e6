"""Entropy of rewarded and of punished tokens."""

from _publish import publish

if __name__ == "__main__":
    publish(["entropy_by_sign"], __doc__)
