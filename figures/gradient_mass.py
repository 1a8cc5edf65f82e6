"""Share and size of the gradient mass per class."""

from _publish import publish

if __name__ == "__main__":
    publish(["gradient_mass"], __doc__)
