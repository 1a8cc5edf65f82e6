"""Share of the tokens in each class."""

from _publish import publish

if __name__ == "__main__":
    publish(["class_share"], __doc__)
