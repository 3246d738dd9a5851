# SPDX-License-Identifier: Apache-2.0
"""Chat templates of the common families come apart into pieces that render the same text."""

from __future__ import annotations

import logging

import pytest
from transformers import AutoTokenizer

from gptq_compile.frontend.chat import decompose, render
from gptq_compile.runtime.chat import chat_prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
) + CHATML
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|h|>' + m['role'] + '<|/h|>\\n\\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
THINKING = (  # the last answer of a conversation is shown with an empty thought, earlier ones without (qwen3)
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m['role'] ~ ': ' ~ m['content'] ~ '\\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, save_tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


CONVERSATIONS = [
    [("user", "Hi there")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "And <|im_end|> you?\n\n{{ x }}")],
    [("system", "Speak like a pirate."), ("user", "Hi")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]


@pytest.mark.parametrize(
    ("template", "bos", "default", "has_system"),
    [
        (CHATML, "", None, True),
        (SMOLLM2, "", "<|im_start|>system\nYou are helpful.<|im_end|>\n", True),
        (LLAMA3, "<s>", None, True),
        (GEMMA, "<s>", None, False),
        (MISTRAL, "<s>", None, False),
        (THINKING, "", None, True),
    ],
    ids=["chatml", "smollm2", "llama3", "gemma", "mistral", "thinking"],
)
def test_decomposed_template_renders_the_same(tokenizer, template, bos, default, has_system):
    tokenizer.chat_template = template
    chat = decompose(tokenizer)
    assert chat is not None
    assert (chat["bos"], chat["default_system"], "system" in chat["roles"]) == (bos, default, has_system)
    for messages in CONVERSATIONS:
        if messages[0][0] == "system" and not has_system:
            continue
        as_dicts = [{"role": role, "content": content} for role, content in messages]
        want = tokenizer.apply_chat_template(as_dicts, tokenize=False, add_generation_prompt=True)
        assert render(chat, messages) == want
        assert chat_prompt(chat, as_dicts) == want


@pytest.mark.parametrize("template", [NUMBERED, "{{ broken", "{{ raise_exception('no') }}"])
def test_other_templates_are_left_alone(tokenizer, template, caplog):
    tokenizer.chat_template = template
    with caplog.at_level(logging.WARNING):
        assert decompose(tokenizer) is None
    assert "cannot be written as a prefix and suffix per role" in caplog.text


def test_no_template(tokenizer, caplog, monkeypatch):
    tokenizer.chat_template = None
    monkeypatch.setattr(logging.getLogger("gptq_compile"), "propagate", True)  # the command line turns it off
    with caplog.at_level(logging.INFO, logger="gptq_compile"):
        assert decompose(tokenizer) is None
    assert "no chat template" in caplog.text
