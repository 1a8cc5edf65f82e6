"""Numbers about one completion that need nothing but its token ids; what sets prompts apart."""

from collections import Counter
from collections.abc import Sequence
from os.path import commonprefix


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion, in [0, 1].

    Examples
    --------
    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = Counter(zip(*(ids[start:] for start in range(n)), strict=False))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def distinguishing(prompts: Sequence[str]) -> list[str]:
    """What sets each prompt apart: the head and tail that all share are folded to an ellipsis.

    Cut at white space, so that no word is torn. A single prompt, or prompts that share nothing,
    stay as they are.

    Examples
    --------
    >>> distinguishing(["system Help. user What is 1+1? end", "system Help. user Is 7 odd? end"])
    ['... What is 1+1? ...', '... Is 7 odd? ...']
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        return list(prompts)
    head = _whole_words(commonprefix(different))
    rest = [prompt[len(head) :] for prompt in different]
    tail = _whole_words(commonprefix([text[::-1] for text in rest]))[::-1]
    folded = {
        prompt: ("... " if head.strip() else "")
        + text[: len(text) - len(tail)].strip()
        + (" ..." if tail.strip() else "")
        for prompt, text in zip(different, rest, strict=True)
    }
    return [folded[prompt] for prompt in prompts]


def _whole_words(text: str) -> str:
    """The text up to and with its last white space; nothing of it if it has none."""
    kept = len(text)
    while kept and not text[kept - 1].isspace():
        kept -= 1
    return text[:kept]
