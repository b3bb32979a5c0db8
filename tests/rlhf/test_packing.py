"""Which sequences go into which micro-batch, and where every token of them lies, by hand."""

import pytest
import torch
from torch.testing import assert_close

from rlhf.packing import by_prompt, pack_padded, pack_shared, padded_chunks, shared_chunks
from rlhf.types import Prompt, Rollout


def rollouts_of(*groups):
    """Completions of these lengths: a prompt of three tokens for each group, tokens 10, 11, ... with log-probabilities -10, -11, ..."""
    return [
        Rollout(
            prompt=Prompt(id=str(g), token_ids=(90 + g, 5, 6), question="q", reference="1"),
            token_ids=tuple(range(10, 10 + length)),
            logprobs=tuple(-float(t) for t in range(10, 10 + length)),
            finish_reason="stop",
            text="",
            policy_version=0,
        )
        for g, lengths in enumerate(groups)
        for length in lengths
    ]


ALL = torch.tensor([True] * 8)


def test_rows_of_a_prompt_come_together_in_the_order_in_which_prompts_first_appear():
    rollouts = rollouts_of([1, 1], [1, 1], [1])
    assert by_prompt(rollouts, [3, 0, 4, 2, 1]) == [[3, 2], [0, 1], [4]]
    assert by_prompt(rollouts, [1, 0]) == [[1, 0]]


# ------------------------------------------------------------------------------------------------------------- micro-batches


def test_the_largest_group_comes_first_and_a_smaller_one_takes_the_first_room_it_fits_in():
    # a group takes 3 + the sum of its lengths less one each: 8, 12, 5, 6 and 7
    rollouts = rollouts_of([6], [5, 6], [3], [4], [5])
    # 12 alone leaves 3; 8 leaves 7, into which 7 fits; 6 and 5 share the third
    assert shared_chunks(rollouts, range(6), 15) == [[2, 1], [0, 5], [4, 3]]


def test_groups_that_fill_the_budget_exactly_share_a_micro_batch():
    rollouts = rollouts_of([6], [6], [6])
    assert shared_chunks(rollouts, range(3), 16) == [[0, 1], [2]]
    assert shared_chunks(rollouts, range(3), 15) == [[0], [1], [2]]
    assert shared_chunks(rollouts, range(3), 24) == [[0, 1, 2]]


def test_a_group_too_large_is_cut_between_completions_longest_first_and_pays_its_prompt_again():
    # 3 + 8 + 5 + 4 = 20; with 16 the first piece takes 3 + 8 + 5, the second 3 + 4
    rollouts = rollouts_of([5, 9, 6])
    assert shared_chunks(rollouts, range(3), 20) == [[1, 2, 0]]
    assert shared_chunks(rollouts, range(3), 16) == [[1, 2], [0]]
    # with 15 the pieces are 3 + 8 and 3 + 5 + 4
    assert shared_chunks(rollouts, range(3), 15) == [[2, 0], [1]]
    # with 11 there are three pieces, the longest alone fills the budget
    assert shared_chunks(rollouts, range(3), 11) == [[1], [2], [0]]


def test_the_pieces_of_a_group_leave_room_that_other_groups_take():
    # pieces 3 + 8 + 5 = 16 and 3 + 4 = 7 of the first group, 3 + 6 = 9 of the second: 7 and 9 together
    rollouts = rollouts_of([5, 9, 6], [7])
    assert shared_chunks(rollouts, range(4), 16) == [[1, 2], [3, 0]]


def test_a_sequence_longer_than_the_budget_is_refused_with_the_key_to_change():
    rollouts = rollouts_of([2, 9])
    sentence = "^a sequence of 11 tokens exceeds training.tokens_per_micro_batch 10; raise it$"
    with pytest.raises(ValueError, match=sentence):
        shared_chunks(rollouts, range(2), 10)
    with pytest.raises(ValueError, match=sentence):
        padded_chunks(rollouts, range(2), 10)
    assert shared_chunks(rollouts, range(2), 11) == [[1], [0]]
    assert padded_chunks(rollouts, range(2), 11) == [[1], [0]]


def test_padded_micro_batches_go_from_long_to_short_and_count_padding():
    # widths 3 + length - 1: 4, 8, 4, 6, 3
    rollouts = rollouts_of([2, 6], [2, 4], [1])
    assert padded_chunks(rollouts, range(5), 16) == [[1, 3], [0, 2, 4]]
    assert padded_chunks(rollouts, range(5), 15) == [[1], [3, 0], [2, 4]]
    assert padded_chunks(rollouts, [4, 2, 0], 8) == [[0, 2], [4]]
    assert padded_chunks(rollouts, [], 8) == []


# ----------------------------------------------------------------------------------------------------------------- one row


def test_a_shared_row_holds_the_prompt_once_and_completions_without_their_last_token():
    rollouts = rollouts_of([3, 2], [4])
    batch = pack_shared(rollouts, [2, 1, 0], ALL)
    assert batch.input_ids.tolist() == [[91, 5, 6, 10, 11, 12, 90, 5, 6, 10, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 3, 4]]
    assert batch.attention_mask is None
    assert [(g.prompt, g.completions) for g in batch.layout] == [((0, 3), ((3, 6),)), ((6, 9), ((9, 10), (10, 12)))]
    assert batch.rows == (2, 1, 0)
    assert batch.kept == (2, 1, 0)
    assert batch.targets.tolist() == [10, 11, 12, 13, 10, 11, 10, 11, 12]
    assert batch.scored.tolist() == [2, 3, 4, 5, 8, 9, 8, 10, 11]
    assert batch.sequences.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert_close(batch.sampler_logprobs, -batch.targets.float())


def test_a_completion_of_one_token_takes_no_place_in_a_shared_row_and_is_scored_from_its_prompt():
    batch = pack_shared(rollouts_of([1, 2]), [0, 1], ALL)
    assert batch.input_ids.tolist() == [[90, 5, 6, 10]]
    assert batch.layout[0].completions == ((3, 4),)
    assert batch.scored.tolist() == [2, 2, 3]


def test_a_sequence_kept_out_of_the_loss_stays_in_the_row_but_has_no_trained_token():
    batch = pack_shared(rollouts_of([3, 2]), [0, 1], torch.tensor([False, True]))
    assert batch.input_ids.tolist() == [[90, 5, 6, 10, 11, 10]]
    assert batch.layout[0].completions == ((3, 5), (5, 6))
    assert (batch.rows, batch.kept) == ((0, 1), (1,))
    assert (batch.scored.tolist(), batch.targets.tolist(), batch.sequences.tolist()) == ([2, 5], [10, 11], [1, 1])


def test_padded_rows_are_filled_on_the_right_and_scored_from_the_token_before():
    rollouts = rollouts_of([3, 1], [5])
    batch = pack_padded(rollouts, [1, 2, 0], torch.tensor([True, True, False]), pad_token_id=7)
    assert batch.input_ids.tolist() == [[90, 5, 6, 7, 7, 7, 7], [91, 5, 6, 10, 11, 12, 13], [90, 5, 6, 10, 11, 7, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3
    assert batch.attention_mask.tolist() == [[i < n for i in range(7)] for n in (3, 7, 5)]
    assert batch.layout is None
    assert (batch.rows, batch.kept) == ((1, 2, 0), (1, 0))
    assert batch.scored.tolist() == [2, 16, 17, 18]
    assert batch.targets.tolist() == [10, 10, 11, 12]
    assert batch.sequences.tolist() == [0, 2, 2, 2]
    assert_close(batch.sampler_logprobs, -batch.targets.float())


@pytest.mark.parametrize("pack", [pack_shared, lambda *a: pack_padded(*a, pad_token_id=0)])
def test_a_batch_without_trained_tokens_has_empty_tensors_that_still_index(pack):
    batch = pack(rollouts_of([2, 3]), [0, 1], torch.tensor([False, False]))
    for empty in (batch.scored, batch.targets, batch.sequences):
        assert (empty.dtype, empty.shape) == (torch.long, (0,))
    assert (batch.sampler_logprobs.dtype, batch.sampler_logprobs.shape, batch.kept) == (torch.float32, (0,), ())
