"""Scripts for environments of their own: pytest does not import them."""

collect_ignore_glob = ["*.py"]
