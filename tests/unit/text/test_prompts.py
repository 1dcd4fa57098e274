import numpy as np
import pytest

from april.core.errors import DataError, RecipeError
from april.core.template import field_names, fill
from april.text.prompts import build_prompts


class Bytes:
    """One token a byte; the chat template is visible."""

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def render(self, messages, *, chat=False):
        if not chat:
            return messages
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


ITEM = {"id": "a", "question": "1+1?", "answer": "2", "metadata": {"expression": "1 + 1"}}


def test_fill_reaches_into_the_metadata() -> None:
    assert fill("{metadata[expression]} =", ITEM, "here") == "1 + 1 ="
    assert fill("Q: {question} {{A}}", ITEM, "here") == "Q: 1+1? {A}"


@pytest.mark.parametrize("template", ["{quesion}", "{metadata[formula]}", "{}", "{question.nothing}", "{question[key]}"])
def test_a_wrong_field_lists_the_right_ones(template: str) -> None:
    with pytest.raises(RecipeError, match="names a field") as info:
        fill(template, ITEM, "prompt.template")
    assert "question, answer, metadata, metadata[expression]" in str(info.value) and "prompt.template" in str(info.value)


def test_unpaired_braces_are_explained() -> None:
    with pytest.raises(RecipeError, match="cannot be read") as info:
        fill("\\frac{1", ITEM, "prompt.template")
    assert "{{" in str(info.value)


def test_field_names_are_cut() -> None:
    names = field_names({f"field_{i}": i for i in range(50)}, limit=3)
    assert names == ["field_0", "field_1", "field_2", "..."]


def test_build_prompts_keeps_text_tokens_and_item() -> None:
    [prompt] = build_prompts([ITEM], Bytes(), "{metadata[expression]} =", max_prompt_tokens=7)
    assert (prompt.id, prompt.text, prompt.item) == ("a", "1 + 1 =", ITEM)
    assert bytes(prompt.token_ids.astype(np.uint8)) == b"1 + 1 ="


def test_chat_and_system_turns() -> None:
    assert build_prompts([ITEM], Bytes(), chat=True)[0].text == "<user>1+1?"
    assert build_prompts([ITEM], Bytes(), chat=True, system="Be brief.")[0].text == "<system>Be brief.<user>1+1?"
    with pytest.raises(RecipeError, match="no effect"):
        build_prompts([ITEM], Bytes(), system="Be brief.")


def test_a_prompt_longer_than_the_context_is_named() -> None:
    long = ITEM | {"id": "long", "question": "x" * 50}
    with pytest.raises(DataError, match="longer than the context") as info:
        build_prompts([ITEM, long], Bytes(), max_prompt_tokens=49)
    assert "prompt long" in str(info.value) and "50 tokens" in str(info.value) and "at most 49" in str(info.value)
    assert len(build_prompts([ITEM, long], Bytes(), max_prompt_tokens=50)) == 2


def test_empty_sets_empty_prompts_and_double_ids_are_errors() -> None:
    with pytest.raises(DataError, match="data set is empty"):
        build_prompts([], Bytes())
    with pytest.raises(DataError, match="no tokens"):
        build_prompts([ITEM | {"question": ""}], Bytes())
    with pytest.raises(DataError, match="occurs twice") as info:
        build_prompts([ITEM, ITEM], Bytes())
    assert "prompt a" in str(info.value)
