"""What one update of each class does to every token."""

from _publish import publish

if __name__ == "__main__":
    publish(["theory_vocabulary"], __doc__)
