"""What is shown is what is trained on, token by token."""

from data.chat import response_of
from data.preview import parts_of, show
from data.records import Demonstration, LabelledSteps, PreferencePair, Problem


def test_a_demonstration_is_trained_on_its_response_and_stop_token_and_on_nothing_else(renderer):
    d = Demonstration(id="d", question="How many?", scratchpad="1 + 1 = 2", answer="2")
    ((prompt, response),) = parts_of(d, renderer)
    assert (prompt.trained, response.trained) == (False, True)
    assert response.token_ids[-1] == renderer.stop_token_id
    assert show([prompt, response], renderer, colour=False) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n[+<think>\n1 + 1 = 2\n</think>\n\\boxed{2}<|im_end|>+]\n"
        f"({len(response.token_ids)} of {len(prompt.token_ids) + len(response.token_ids)} tokens trained on)"
    )


def test_colours_tell_the_same_and_control_characters_are_shown_not_obeyed(renderer):
    d = Demonstration(id="d", question="q", scratchpad="", answer="", response="a\x1b[31mb")
    shown = show(parts_of(d, renderer)[0], renderer, colour=True)
    assert shown.startswith("\x1b[2m<|im_start|>user")
    assert "\x1b[1;32ma\\x1b[31mb<|im_end|>\x1b[0m" in shown


def test_a_pair_is_two_sequences_with_one_prompt(renderer):
    pair = PreferencePair(id="p", question="q", chosen="good", rejected="bad")
    (prompt, chosen), (same_prompt, rejected) = parts_of(pair, renderer)
    assert prompt == same_prompt
    assert (chosen.good, rejected.good) == (True, False)
    assert "[-bad<|im_end|>-]" in show([prompt, rejected], renderer, colour=False)


def test_steps_show_their_labels_and_a_problem_its_prompt(renderer):
    steps = LabelledSteps(id="s", question="q", steps=["one", "two"], labels=[True, False])
    text = show(parts_of(steps, renderer)[0], renderer, colour=False)
    assert "[+one\n+][-two\n-]" in text
    (parts,) = parts_of(Problem(id="p", question="q", answer="1"), renderer)
    assert [part.trained for part in parts] == [False]


def test_earlier_turns_and_the_conversations_own_system_prompt_are_rendered(renderer):
    d = Demonstration(
        id="d", question="c", scratchpad="", answer="", response="d", history=["a", "b"], system="Be brief."
    )
    prompt, response = renderer.demonstration_ids(d)
    assert renderer.tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert renderer.decode(response) == "d"
    pair = PreferencePair(id="p", question="c", chosen="d", rejected="e", history=["a", "b"], system="Be brief.")
    assert renderer.pair_ids(pair)[:2] == (prompt, response)


def test_a_response_given_word_for_word_is_not_rendered_again():
    d = Demonstration(id="d", question="q", scratchpad="t", answer="2", response="<think>t</think> So \\boxed{2}.")
    assert response_of(d) == "<think>t</think> So \\boxed{2}."
