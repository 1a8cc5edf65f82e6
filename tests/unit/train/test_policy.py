"""Prompts as the model sees them: template, system prompt, begin token, ends, length limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_models import byte_tokenizer
from wapo_analysis.errors import UserError
from wapo_analysis.train.policy import PromptFormat, PromptStyle

TOKENIZER = byte_tokenizer()
CHAT = PromptFormat(TOKENIZER, PromptStyle())
PLAIN = PromptFormat(TOKENIZER, PromptStyle(chat="off"))
IM_END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def test_auto_uses_a_template_where_there_is_one() -> None:
    assert CHAT.chat
    assert not PromptFormat(byte_tokenizer(template=None), PromptStyle()).chat
    assert CHAT.render("hi") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert PLAIN.render("hi") == "hi"


def test_system_prompt_replaces_the_templates_own() -> None:
    text = PromptFormat(TOKENIZER, PromptStyle(system="Think.")).render("hi")
    assert text.startswith("<|im_start|>system\nThink.<|im_end|>")
    assert "Be brief" not in text


def test_special_tokens_of_the_template_are_one_token_each() -> None:
    ids = CHAT.encode("hi").ids
    assert ids.count(IM_END) == 2
    assert TOKENIZER.decode(ids) == CHAT.encode("hi").text


def test_the_template_tells_how_a_turn_ends() -> None:
    assert CHAT.end_ids() == (IM_END,)
    assert PLAIN.end_ids() == ()


def test_begin_token_is_put_only_where_the_tokenizer_would() -> None:
    from tokenizers.processors import TemplateProcessing

    with_begin = byte_tokenizer(template=None, bos_token="<|im_start|>")
    with_begin.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    prompt = PromptFormat(with_begin, PromptStyle()).encode("hi")
    assert prompt.text == "<|im_start|>hi"
    assert prompt.ids == with_begin("hi")["input_ids"]
    assert PLAIN.encode("hi").ids == TOKENIZER("hi")["input_ids"]


@given(text=st.text(max_size=40), room=st.integers(1, 60))
def test_a_long_prompt_loses_its_beginning_never_the_template(text: str, room: int) -> None:
    bare = len(CHAT.encode("").ids)
    whole = CHAT.encode(text)
    cut = CHAT.encode(text, bare + room)
    assert len(cut.ids) <= max(bare + room, 0)
    assert cut.cut == (len(whole.ids) > bare + room)
    head, tail = CHAT.render("X").split("X")
    assert cut.text.startswith(head)
    assert cut.text.endswith(tail)
    kept = cut.text.removeprefix(head).removesuffix(tail)
    assert text.endswith(kept)
    # Nothing more is lost than the limit asks for, but for a character of several bytes.
    assert not cut.cut or len(kept.encode()) > room - 4


def test_a_limit_below_the_template_is_refused() -> None:
    with pytest.raises(UserError, match="chat template alone takes"):
        CHAT.encode("a" * 50, 10)


def test_what_a_tokenizer_cannot_do_is_refused() -> None:
    bare = byte_tokenizer(template=None)
    with pytest.raises(UserError, match="no chat template"):
        PromptFormat(bare, PromptStyle(chat="on"))
    with pytest.raises(UserError, match="system_prompt needs"):
        PromptFormat(bare, PromptStyle(system="x"))
    picky = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match="no system role"):
        PromptFormat(picky, PromptStyle())
