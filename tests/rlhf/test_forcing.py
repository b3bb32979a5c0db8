"""Budget forcing with a policy of which every character is known: a token is a character, and `$` ends a turn."""

import dataclasses

import pytest

from rlhf.rollout.engine import Sampling
from rlhf.rollout.forcing import Forcing, generate_forced, thoughts_end
from rlhf.sampling import Question, from_forced
from rlhf.types import Prompt, Rollout

SAMPLING = Sampling(samples_per_prompt=1, temperature=1.0, max_new_tokens=99)


def ids(text):
    return tuple(map(ord, text))


def decode(token_ids):
    return "".join(map(chr, token_ids)).removesuffix("$")


class Policy:
    """Continues what it has written by a fixed text, wherever it stands in it; else with what it says after the closing of its thoughts."""

    def __init__(self, *texts, answers="7}$"):
        self.texts, self.answers, self.calls = texts, answers, []

    def generate(self, prompts, sampling, *, seed):
        assert sampling.samples_per_prompt == 1
        self.calls.append((len(prompts), sampling.max_new_tokens, seed))
        rollouts = []
        for prompt in prompts:
            _, _, written = decode(prompt.token_ids).partition("?")
            left = next((t[len(written) :] for t in self.texts if t.startswith(written)), self.answers)
            sampled = left[: sampling.max_new_tokens]
            rollouts.append(
                Rollout(
                    prompt=prompt, token_ids=ids(sampled), logprobs=(-0.5,) * len(sampled),
                    finish_reason="stop" if sampled.endswith("$") else "length", text=decode(ids(sampled)), policy_version=0,
                )
            )  # fmt: skip
        return rollouts


def forcing(limit, **more):
    parts = dict(closing="</t>[", line_break="\n", opening="<t>") | {
        k: v for k, v in more.items() if isinstance(v, str)
    }
    numbers = {"answer_tokens": 9} | {k: v for k, v in more.items() if not isinstance(v, str)}
    return Forcing(
        thinking_tokens=limit, close_tag="</t>", **{name: ids(text) for name, text in parts.items()}, **numbers
    )


def force(policy, how, prompts=("2+5?",), sampling=SAMPLING):
    asked = [Prompt(id=p, token_ids=ids(p), question=p, reference="7") for p in prompts]
    return generate_forced(policy, asked, sampling, how, decode, seed=0)


def test_thoughts_that_end_before_the_limit_are_left_alone():
    [made] = force(Policy("<t>ab\n</t>[7]$"), forcing(20))
    assert decode(made.token_ids) == "<t>ab\n</t>[7]"
    assert (made.thinking_tokens, made.was_cut, made.finish_reason) == (3, False, "stop")
    assert made.sampled_tokens == len(made.logprobs) == len("ab\n</t>[7]$")


def test_thoughts_are_cut_at_the_limit_and_the_answer_is_asked_for():
    policy = Policy("<t>abcdefgh\n</t>[7]$")
    [made] = force(policy, forcing(4))
    assert decode(made.token_ids) == "<t>abcd\n</t>[7}"
    assert (made.thinking_tokens, made.was_cut, made.finish_reason) == (4, True, "stop")
    assert made.sampled_tokens == 4 + len("7}$")
    assert [room for _, room, _ in policy.calls] == [4, 9]


def test_thoughts_that_were_cut_at_the_end_of_a_line_get_no_empty_line():
    [made] = force(Policy("<t>ab\ncd\n</t>[7]$"), forcing(3))
    assert decode(made.token_ids) == "<t>ab\n</t>[7}"


def test_a_limit_of_zero_asks_at_once_and_samples_no_thought():
    policy = Policy("<t>abcdefgh\n</t>[7]$")
    [made] = force(policy, forcing(0))
    assert decode(made.token_ids) == "<t>\n</t>[7}"
    assert (made.thinking_tokens, made.was_cut) == (0, True)
    assert len(policy.calls) == 1


def test_an_answer_that_the_limit_interrupts_is_finished_and_nothing_is_put_into_it():
    [made] = force(Policy("<t>ab\n</t>[7]$"), forcing(9))  # the limit falls behind the bracket
    assert decode(made.token_ids) == "<t>ab\n</t>[7]"
    assert (made.thinking_tokens, made.was_cut, made.finish_reason) == (3, False, "stop")


def test_an_answer_that_does_not_end_is_truncated_whatever_became_of_the_thoughts():
    [cut] = force(Policy("<t>abcdefgh", answers="7" * 50), forcing(4))
    assert (cut.finish_reason, cut.was_cut) == ("length", True)
    assert decode(cut.token_ids) == "<t>abcd\n</t>[" + "7" * 9
    [whole] = force(Policy("<t>ab\n</t>" + "7" * 50), forcing(8))
    assert (whole.finish_reason, whole.was_cut) == ("length", False)


def test_a_turn_that_ends_within_its_thoughts_is_finished_as_it_stands():
    [made] = force(Policy("<t>ab$"), forcing(20))
    assert (decode(made.token_ids), made.finish_reason, made.was_cut) == ("<t>ab", "stop", False)


def test_a_tag_that_comes_too_early_is_replaced_as_often_as_the_recipe_says():
    policy = Policy("<t>ab\n</t>[6]$", "<t>ab\nWait cd\n</t>[7]$")
    [once] = force(policy, forcing(20, wait="Wait", num_waits=1))
    assert decode(once.token_ids) == "<t>ab\nWait cd\n</t>[7]"
    assert (once.waits, once.thinking_tokens, once.was_cut) == (1, len("ab\n cd\n"), False)
    [cut] = force(Policy("<t>ab\n</t>[6]$", "<t>ab\nWait cdefgh\n</t>[7]$"), forcing(7, wait="Wait", num_waits=1))
    assert decode(cut.token_ids) == "<t>ab\nWait cde\n</t>[7}"
    assert (cut.thinking_tokens, cut.was_cut) == (len("ab\n cde"), True)


def test_a_tag_of_several_tokens_that_the_limit_interrupts_is_written_once():
    [made] = force(Policy("<t>ab\n</t>7$"), forcing(5))
    assert decode(made.token_ids) == "<t>ab\n</t>[7}"
    assert (made.thinking_tokens, made.was_cut) == (3, True)


def test_samples_of_a_prompt_stay_together_and_each_goes_its_own_way():
    policy = Policy("<t>ab\n</t>[7]$")
    sampling = dataclasses.replace(SAMPLING, samples_per_prompt=2)
    made = force(policy, forcing(4), prompts=("1+1?", "2+5?"), sampling=sampling)
    assert [f.prompt.id for f in made] == ["1+1?", "1+1?", "2+5?", "2+5?"]
    assert policy.calls[0][0] == 4
    assert len({seed for _, _, seed in policy.calls}) == len(policy.calls)


def test_what_was_put_in_has_no_part_in_lengths_or_confidence():
    generate = from_forced(Policy("<t>abcdefgh"), SAMPLING, forcing(4), decode)
    [[completion]] = generate([Question(id="p", text="2+5?", token_ids=ids("2+5?"))], 0)
    assert completion.text == "<t>abcd\n</t>[7}"
    assert (completion.num_tokens, completion.thinking_tokens, completion.was_cut) == (7, 4, True)
    assert completion.confidence == pytest.approx(2.718281828**-0.5)


@pytest.mark.parametrize(
    ("pieces", "end"),
    [(["a", "b", "</t>", "c"], 2), (["a", "b</", "t>"], 1), (["</t>"], 0), (["a", "</t"], None), (["a</t>b"], 0)],
)
def test_thoughts_end_before_the_token_with_which_the_tag_begins(pieces, end):
    def decode_pieces(numbers):
        return "".join(pieces[n] for n in numbers)

    assert thoughts_end(range(len(pieces)), "</t>", decode_pieces) == end


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(thinking_tokens=-1, answer_tokens=1), "set them to 0 or more and 1 or more"),
        (dict(thinking_tokens=1, answer_tokens=0), "set them to 0 or more and 1 or more"),
        (dict(thinking_tokens=1, answer_tokens=1, num_waits=1), "wait is empty"),
    ],
)
def test_limits_that_mean_nothing_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Forcing(close_tag="</t>", **numbers)
