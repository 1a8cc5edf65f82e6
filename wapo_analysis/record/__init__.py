"""Recording: token passes in, a run folder out; any trainer feeds it."""
