"""A small, readable RLVR trainer that is watched token by token."""
