"""The entropy change of the probed updates, taken apart by class, momentum and interaction."""

from _publish import publish

if __name__ == "__main__":
    publish(["waterfall"], __doc__)
