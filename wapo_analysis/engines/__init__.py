"""The same recipe on somebody else's distributed trainer."""
