"""The response as text, with tokenizers that change what they are given, and every token at which an engine ends."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from skd_plugin.models import engine_end_ids, load_tokenizer, response_text

COMPOSED = "\u09dc\u09df \u00e9"  # Assamese letters with a nukta, and an e with an accent, each as one code point
TEXTS = [
    "the answer is 73 .",
    "The Answer is 73 .",
    "  two  spaces ",
    COMPOSED,
    unicodedata.normalize("NFD", COMPOSED),
]
PROMPTS = ["what is it ?", "What Is It ?", " e", f"{COMPOSED} e", "\u09a1"]


def trained(normalizer, pre_tokenizer, decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else []
    special = ["<unk>", "</s>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *PROMPTS] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "byte level": trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "NFC": trained(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "prefix space": trained(None, pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "lower case": trained(
        normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    ),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(prompt=st.sampled_from(PROMPTS), text=st.sampled_from(TEXTS), ended=st.booleans())
def test_a_response_is_what_its_own_ids_say(tokenizer, prompt: str, text: str, ended: bool) -> None:
    """Whatever the prompt does to the text of both together, of which a cut at the prompt's length is another text."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("</s>")
    alone = tokenizer.decode(ids, skip_special_tokens=True)
    assert response_text(tokenizer, [*ids, end] if ended else ids, {end}) == alone


def test_a_cut_out_of_the_whole_text_is_another_response() -> None:
    """What was scored before, of a right answer."""
    tokenizer = TOKENIZERS["NFC"]
    prompt, answer = unicodedata.normalize("NFD", COMPOSED), "the answer is 73 ."
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
    cut = tokenizer.decode([*ids[0], *ids[1]])[len(prompt) :]
    assert response_text(tokenizer, ids[1], set()) == answer != cut


def test_an_end_token_that_is_no_special_one_is_taken_off_once() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("is it . .", add_special_tokens=False).input_ids
    assert response_text(tokenizer, ids, {ids[-1]}) == "is it ."
    assert response_text(tokenizer, [], {1}) == ""


def test_every_token_at_which_an_engine_ends(tiny_pair: Path, tmp_path: Path) -> None:
    """Those of the teacher's tokenizer, config and generation_config, and the student's own."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_pair / "teacher", teacher)
    student = load_tokenizer(str(tiny_pair / "student"), "student")
    student.eos_token = "c"
    for file, value in (("config.json", 6), ("generation_config.json", [7, 8])):
        content = json.loads((teacher / file).read_text())
        (teacher / file).write_text(json.dumps(content | {"eos_token_id": value}))
    assert engine_end_ids(str(teacher), load_tokenizer(str(teacher), "teacher"), student) == {2, 5, 6, 7, 8}
    (teacher / "generation_config.json").unlink()
    student.eos_token = None  # none at all is no crash
    assert engine_end_ids(str(teacher), load_tokenizer(str(teacher), "teacher"), student) == {2, 6}
