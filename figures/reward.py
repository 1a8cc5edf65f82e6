"""Reward and pass rate over the steps."""

from _publish import publish

if __name__ == "__main__":
    publish(["reward"], __doc__)
