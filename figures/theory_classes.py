"""One policy under many updates of each class."""

from _publish import publish

if __name__ == "__main__":
    publish(["theory_classes"], __doc__)
