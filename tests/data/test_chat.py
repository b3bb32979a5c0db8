"""One renderer: what it promises, and what it refuses."""

import pytest

from data.chat import CHATML, ChatRenderer, render_response
from rlhf.models import load_tokenizer


def copy_of(tokenizer, tmp_path, **changes):
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(str(tmp_path))
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_a_prompt_is_the_chat_markers_around_the_question(renderer):
    assert renderer.prompt_text("How many?") == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert (
        ChatRenderer(renderer.tokenizer, "Think.")
        .prompt_text("How many?")
        .startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n")
    )


@pytest.mark.parametrize(
    "text",
    [
        "a 12 b",
        "naïve café 東京 🙂",
        "<think>\n1 + 2 = 3\n</think>\n\\boxed{3}",
        "  two  spaces\n\n",
        "<|im_end|> as text",
    ],
)
def test_any_text_survives_the_round_trip(renderer, text):
    if "<|im_end|>" not in text:
        assert renderer.decode(renderer.response_ids(text)) == text
    assert renderer.response_ids(text)[-1] == renderer.stop_token_id


def test_training_and_rollout_see_the_same_prompt_token_by_token(renderer, demonstrations):
    d = demonstrations[0]
    whole = renderer.tokenizer.encode(
        renderer.prompt_text(d.question) + render_response(d.scratchpad, d.answer) + "<|im_end|>",
        add_special_tokens=False,
    )
    assert whole == renderer.prompt_ids(d.question) + renderer.response_ids(render_response(d.scratchpad, d.answer))


def test_digits_are_tokens_of_their_own(renderer):
    assert len(renderer.tokenizer.encode("12345", add_special_tokens=False)) == 5


def test_a_template_that_opens_the_thoughts_leaves_the_rest_to_the_policy(tokenizer, tmp_path):
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    prefilled = ChatRenderer(copy_of(tokenizer, tmp_path, chat_template=template))
    assert prefilled.prefill == "<think>\n"
    assert prefilled.completion(render_response("1 + 1 = 2", "2")) == "1 + 1 = 2\n</think>\n\\boxed{2}"
    assert ChatRenderer(tokenizer).prefill == ""


def test_a_doubled_bos_is_refused(tokenizer, tmp_path):
    doubled = copy_of(tokenizer, tmp_path, bos_token="<|im_start|>", chat_template="<|im_start|>" + CHATML)
    with pytest.raises(ValueError, match="twice"):
        ChatRenderer(doubled).require_round_trip("q", "a")


def test_a_template_that_drops_the_question_is_refused(tokenizer, tmp_path):
    silent = copy_of(tokenizer, tmp_path, chat_template="<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="does not show the question"):
        ChatRenderer(silent).require_round_trip("How many?", "a")


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "hello": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lossy = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    lossy.chat_template = CHATML
    with pytest.raises(ValueError, match="does not give back what it was given"):
        ChatRenderer(lossy).require_round_trip("hello", "goodbye")


def test_a_pad_token_that_is_the_stop_token_is_refused(tokenizer, tmp_path):
    shared = copy_of(tokenizer, tmp_path, pad_token="<|im_end|>")
    shared.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give it a pad token of its own"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_template_is_refused(tokenizer, tmp_path):
    copy_of(tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(str(tmp_path))
