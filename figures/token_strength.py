"""Mean coefficient of a token per probability bin and sign."""

from _publish import publish

if __name__ == "__main__":
    publish(["token_strength"], __doc__)
