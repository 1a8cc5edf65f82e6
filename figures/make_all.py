"""Draw every published figure: python figures/make_all.py [RUN ...] [--out DIR]."""

from _publish import publish

from wapo_analysis.plots import FIGURES

if __name__ == "__main__":
    publish(list(FIGURES), __doc__)
