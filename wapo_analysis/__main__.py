"""``python -m wapo_analysis`` is the ``wapo`` command."""

from wapo_analysis.cli import main

if __name__ == "__main__":
    main()
