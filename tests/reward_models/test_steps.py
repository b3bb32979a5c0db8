"""Where steps are: in text, in a policy's own tokens whatever it merged, and in what a process model reads."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.stories import generate_stories, judge_steps, write_steps
from reward_models.steps import Step, decode_pieces, encode_steps, find_steps, split_steps

COMPLETION = "<think>\n1 + 2 = 3\n3 * 2 = 6\n</think>\n\\boxed{6}"


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        (COMPLETION, "\n", ["<think>\n1 + 2 = 3", "3 * 2 = 6", "</think>\n\\boxed{6}"]),
        (COMPLETION, "\n\n", [COMPLETION]),
        ("<think>\n</think>\n\\boxed{6}", "\n", ["<think>\n</think>\n\\boxed{6}"]),
        ("<think> a </think> \n\n\n b", "\n", ["<think> a </think>", "b"]),
        ("a\n\nb\nc\n\n", "\n\n", ["a", "b\nc"]),
        ("1 ки\n2 ки", "ки", ["1", "2"]),
        ("a\n</think>\n", "\n", ["a"]),
        ("<think>\n\n</think>", "\n", []),
        ("", "\n", []),
    ],
)
def test_blank_pieces_and_bare_think_tags_belong_to_the_next_step_and_the_answer_is_one(text, separator, steps):
    assert [step for step, _ in split_steps(text, separator)] == steps


PARTS = st.lists(st.sampled_from(["a", "b", " ", "\n", "<think>", "</think>"]), max_size=12).map("".join)


@given(PARTS, st.sampled_from(["\n", "\n\n", "b"]))
def test_every_character_that_means_something_is_in_one_step_which_ends_where_it_says(text, separator):
    found = split_steps(text, separator)
    assert all(step and text[:end].endswith(step) for step, end in found)
    assert [end for _, end in found] == sorted({end for _, end in found})

    def bare(said):
        return re.sub(r"\s|</?think>", "", said.replace(separator, ""))

    assert bare("".join(step for step, _ in found)) == bare(text)


@given(st.lists(st.sampled_from(["a", "b c", "<think>", "</think>"]), min_size=1, max_size=8))
def test_steps_with_the_separator_between_them_are_what_the_policy_wrote(lines):
    steps = [step for step, _ in split_steps("\n".join([*lines, "end"]), "\n")]
    assert "\n".join(steps) == "\n".join([*lines, "end"])


def test_a_story_is_cut_into_the_steps_it_was_written_from(renderer):
    for story in [next(generate_stories("train", seed=s, min_level=2, max_level=5)) for s in range(5)]:
        first, *steps = write_steps(story.events, story.values)
        text = "\n".join(["<think>", first, *steps, "</think>", f"\\boxed{{{story.answer}}}"])
        found = find_steps(renderer.response_ids(text), text, renderer.tokenizer, "\n")
        assert [step.text for step in found] == [
            f"<think>\n{first}", *steps, f"</think>\n\\boxed{{{story.answer}}}",
        ]  # fmt: skip
        assert judge_steps(story, [step.text for step in found]) == [True] * len(found)


def test_a_record_reads_as_a_completion_does(renderer):
    text = "<think>\n1 + 2 = 3\n3 * 2 = 6"
    prompt = renderer.prompt_ids("How many?")
    live = [step for step, _ in split_steps(text, "\n")]
    recorded = ["1 + 2 = 3", "3 * 2 = 6"]
    read = [
        encode_steps(prompt, steps, renderer.tokenizer, separator="\n", opening="<think>\n")
        for steps in (live, recorded)
    ]
    assert read[0] == read[1]
    assert read[0][0] == prompt + renderer.tokenizer.encode(text + "\n", add_special_tokens=False)


def test_a_position_is_the_token_that_holds_the_steps_last_character_and_not_the_stop_token(renderer):
    ids = renderer.response_ids(COMPLETION)
    found = find_steps(ids, COMPLETION, renderer.tokenizer, "\n")
    for step in found:
        before = renderer.tokenizer.decode(ids[: step.position])
        through = renderer.tokenizer.decode(ids[: step.position + 1])
        end = COMPLETION.index(step.text) + len(step.text)
        assert len(before) < end <= len(through)
    assert found[-1].position == len(ids) - 2


def test_a_completion_without_a_step_is_one_empty_step_that_ends_with_it(renderer):
    text = "<think>\n</think>"
    ids = renderer.response_ids(text)
    assert find_steps(ids, text, renderer.tokenizer, "\n") == [Step("", len(ids) - 1)]
    assert find_steps([renderer.stop_token_id], "", renderer.tokenizer, "\n") == [Step("", 0)]


@pytest.fixture(scope="module")
def merging():
    """A tokenizer with tokens across the ends of steps: "3\\n", "\\n4" and "=5\\n=6", which has a whole step inside."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("3", "Ċ"), ("Ċ", "4"), ("=", "5"), ("=", "6"), ("=5", "Ċ"), ("=5Ċ", "=6")]
    words = [*alphabet, *("".join(pair) for pair in merges), "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.mark.parametrize(
    ("text", "tokens", "positions"),
    [
        ("13\n2", ["1", "3\n", "2"], [1, 2]),  # the token of the last character ends the line as well
        ("1\n42", ["1", "\n4", "2"], [0, 2]),  # the next step's beginning is not in the step's last token
        ("1=5\n=6", ["1", "=5\n=6"], [1, 1]),  # two steps end in one token
        ("1\né", ["1", "\n", "é"], [0, 3]),  # the last character has two tokens
    ],
)
def test_steps_end_in_the_token_of_their_last_character_whatever_the_tokenizer_merged(merging, text, tokens, positions):
    ids = merging.encode(text, add_special_tokens=False)
    assert [piece for piece in decode_pieces(ids, merging) if piece] == tokens
    for completion in (ids, [*ids, merging.eos_token_id]):
        assert [step.position for step in find_steps(completion, text, merging, "\n")] == positions


def test_half_a_character_at_the_end_is_no_step(merging):
    ids = merging.encode("1\né", add_special_tokens=False)[:-1]
    assert find_steps(ids, merging.decode(ids), merging, "\n") == [Step("1", 0)]


def test_a_step_reads_the_same_at_the_end_of_a_solution_and_inside_one(merging):
    alone, ends = encode_steps([7], ["13"], merging, separator="\n")
    followed, both = encode_steps([7], ["13", "42"], merging, separator="\n")
    assert followed[: len(alone)] == alone
    opened, later = encode_steps([7], ["13"], merging, separator="\n", opening="5")
    assert (merging.decode(opened[1:]), later) == ("513\n", [3])
    assert (ends, both[:1]) == ([2], [2])
    assert merging.decode(followed[1:]) == "13\n42\n"
    assert merging.convert_ids_to_tokens(followed)[both[0]] == "3Ċ"  # and no token lies in two steps


def test_a_tokenizer_that_is_not_the_policys_is_found_out(renderer, merging):
    ids = renderer.response_ids(COMPLETION)
    with pytest.raises(ValueError, match="must have the tokenizer of the policy"):
        find_steps(ids, COMPLETION, merging, "\n")
