"""Share of tokens, and of |dH|, that break the class's rule."""

from _publish import publish

if __name__ == "__main__":
    publish(["rule_breaks"], __doc__)
