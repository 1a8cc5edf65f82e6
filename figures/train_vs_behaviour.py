"""p of the trained against p of the behaviour policy."""

from _publish import publish

if __name__ == "__main__":
    publish(["train_vs_behaviour"], __doc__)
