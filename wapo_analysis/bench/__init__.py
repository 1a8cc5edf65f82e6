"""Performance goals, measured where the user stands: ratios of variants run side by side.

``run`` measures all areas; ``goals`` holds what must be reached; ``reference`` the programs that
are compared with, written anew. A variant is timed only after its numbers passed a comparison with
float64 on the same inputs. Needs torch, so nothing below imports this package but ``cli``.
"""
