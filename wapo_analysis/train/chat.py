"""From a problem's text to what the model sees: chat template, system prompt, ends, length limit.

One place encodes prompts, so that the text a run records is the text the policy was given.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from wapo_analysis.errors import UserError

_MARK = "wapo"  # stands for an assistant's words when the template is asked how it ends them


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are put to a policy and what ends its completions.

    Attributes
    ----------
    chat : {"auto", "on", "off"}
        Use the tokenizer's chat template; auto uses it if there is one.
    system : str or None
        System prompt of the template; None leaves the template's own.
    stop : tuple of str
        Texts that end a completion, beside the model's end tokens.
    """

    chat: str = "auto"
    system: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it.

    Attributes
    ----------
    text : str
        Template and begin token included.
    ids : list of int
        Its token ids.
    cut : bool
        The beginning of the problem's text was left out to fit a length limit.
    """

    text: str
    ids: list[int]
    cut: bool = False


class PromptFormat:
    """Encodes prompts for one tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    style : PromptStyle

    Raises
    ------
    UserError
        If a chat template is asked for and the tokenizer has none, a system prompt is given
        without a template, or the template cannot be used.
    """

    def __init__(self, tokenizer: Any, style: PromptStyle) -> None:
        self.style = style
        self._tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if style.chat == "on" and not has_template:
            raise UserError("chat is on, but the model's tokenizer has no chat template; set off")
        self.chat = style.chat == "on" or (style.chat == "auto" and has_template)
        if style.system is not None and not self.chat:
            raise UserError("system_prompt needs a chat template, and none is used here")
        self._begin = [] if self.chat else _begin_ids(tokenizer)
        self._bare = len(self._ids(self.render("")))

    def render(self, prompt: str) -> str:
        """Text the model is given for a problem's text.

        Raises
        ------
        UserError
            If the chat template refuses it (some know no system prompt).
        """
        if not self.chat:
            return str(self._tokenizer.decode(self._begin)) + prompt if self._begin else prompt
        return self._templated(prompt, add_generation_prompt=True)

    def encode(self, prompt: str, limit: int | None = None) -> Prompt:
        """Encode a problem's text.

        Parameters
        ----------
        prompt : str
        limit : int, optional
            Most tokens. A longer prompt loses tokens from the beginning of its own text, never of
            the template, and is marked as cut.

        Raises
        ------
        UserError
            If not even an empty text fits.
        """
        text = self.render(prompt)
        ids = self._ids(text)
        if limit is None or len(ids) <= limit:
            return Prompt(text, ids)
        if self._bare >= limit:
            raise UserError(
                f"max_prompt_tokens is {limit}, but the chat template alone takes {self._bare}"
            )
        own = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        dropped = 0
        # Text that is decoded and encoded again can come out longer; then drop a little more.
        while len(ids) > limit:
            dropped += len(ids) - limit
            rest = str(self._tokenizer.decode(own[dropped:])).lstrip("\N{REPLACEMENT CHARACTER}")
            text = self.render(rest)
            ids = self._ids(text)
        return Prompt(text, ids, cut=True)

    def turns(self, prompt: str) -> list[dict[str, str]]:
        """The conversation that a problem's text begins."""
        system = self.style.system
        turns = [] if system is None else [{"role": "system", "content": system}]
        return [*turns, {"role": "user", "content": prompt}]

    def end_ids(self) -> tuple[int, ...]:
        """Tokens by which the chat template ends an assistant's turn; empty without a template."""
        if not self.chat:
            return ()
        after = self._templated("", reply=_MARK).rpartition(_MARK)[2]
        special = _special_ids(self._tokenizer)
        ids = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        return tuple(token for token in ids if token in special)[:1]

    def _templated(self, prompt: str, reply: str | None = None, **options: Any) -> str:
        turns = self.turns(prompt)
        if reply is not None:
            turns.append({"role": "assistant", "content": reply})
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except (TemplateError, ValueError) as error:
            raise UserError(f"the model's chat template fails: {error}; set chat off") from error

    def _ids(self, text: str) -> list[int]:
        # A rendered template holds its own begin token; plain text was given one by render.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _begin_ids(tokenizer: Any) -> list[int]:
    """Begin token, as a list, if the tokenizer itself would put one before plain text."""
    begin = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [begin] if begin is not None and ids[:1] == [begin] else []


def _special_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
