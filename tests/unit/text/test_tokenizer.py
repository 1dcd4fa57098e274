import json
from pathlib import Path

import numpy as np
import pytest

from april.core.errors import ModelError
from april.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789+-= <>/")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def make(**special: str):
    vocab = {letter: i for i, letter in enumerate([*LETTERS, "[UNK]", *special.values()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make(eos_token="[EOS]", pad_token="[PAD]"))


def test_encode_adds_nothing_and_decode_inverts_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab1")
    assert ids.dtype == np.int32 and ids.tolist() == [0, 1, 27]
    assert tokenizer.decode(ids) == "ab1"
    assert not ids.flags.writeable


def test_special_tokens_show_only_on_request(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a b"), tokenizer.eos_ids[0]]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode(ids, keep_special=True) == "a b[EOS]"


def test_special_tokens_written_in_a_text_are_recognised(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a[EOS]").tolist() == [0, tokenizer.eos_ids[0]]


def test_padding_falls_back_on_the_end_of_sequence(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == len(LETTERS) + 2
    assert Tokenizer(make(eos_token="[EOS]")).pad_id == len(LETTERS) + 1
    assert tokenizer.vocab_size == len(LETTERS) + 3


def test_a_tokenizer_without_eos_is_refused_and_says_what_to_set() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token") as info:
        Tokenizer(make(), where="models/tiny")
    assert "eos_token" in str(info.value) and "models/tiny" in str(info.value)
    assert Tokenizer(make(), eos_ids=[3]).eos_ids == (3,)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, eos_token_id = False, 1

    with pytest.raises(ModelError, match="slow") as info:
        Tokenizer(Slow())
    assert "Slow" in str(info.value)


@pytest.mark.parametrize(("value", "expected"), [([3, 5], (44, 3, 5)), (7, (44, 7)), (44, (44,)), (None, (44,))])
def test_load_joins_both_lists_of_end_tokens(tmp_path: Path, value: object, expected: tuple[int, ...]) -> None:
    make(eos_token="[EOS]").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == expected
    assert loaded.decode(loaded.encode("1+2 = 3")) == "1+2 = 3"


def test_load_without_a_generation_config(tmp_path: Path) -> None:
    make(eos_token="[EOS]").save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path)).eos_ids == (44,)


def test_load_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded") as info:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(info.value) and len(str(info.value).splitlines()) < 10


def test_a_broken_generation_config_is_an_error(tmp_path: Path) -> None:
    make(eos_token="[EOS]").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation config") as info:
        Tokenizer.load(tmp_path)
    assert "generation_config.json" in str(info.value)


def test_render_uses_the_chat_template_only_when_asked() -> None:
    backend = make(eos_token="[EOS]")
    backend.chat_template = TEMPLATE
    tokenizer = Tokenizer(backend)
    assert tokenizer.render("hi") == "hi"
    assert tokenizer.render("hi", chat=True) == "<user>hi<assistant>"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.render(turns, chat=True) == "<system>s<user>u<assistant>"
    with pytest.raises(ModelError, match="chat = true"):
        tokenizer.render(turns)


def test_render_without_a_chat_template_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="no chat template") as info:
        tokenizer.render("hi", chat=True)
    assert "chat = false" in str(info.value)


def test_round_trip_lists_exactly_the_offenders(tokenizer: Tokenizer) -> None:
    assert tokenizer.round_trip(["a+b", "1 = 1", "[EOS]"]) == []
    assert tokenizer.round_trip(["ok", "Ünknown", "fine"]) == ["Ünknown"]
