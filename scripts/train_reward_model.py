"""Outcome reward model. `accelerate launch scripts/train_reward_model.py --config recipes/tiny/reward_model.yaml`"""

from data.chat import ChatRenderer
from data.records import PreferencePair, read_records
from reward_models.outcome import TokenPair, train
from reward_models.pair_report import report_table
from rlhf.config import RewardModel
from rlhf.models import check_model_path, load_tokenizer
from rlhf.run import Run, run_stage, say


def train_reward_model(config: RewardModel, run: Run) -> None:
    pairs = {
        name: read_records(PreferencePair, path)
        for name, path in (("train", config.train_pairs), ("held-out", config.heldout_pairs))
    }
    check_model_path(config.model.path, "model.path")
    renderer = ChatRenderer(
        load_tokenizer(config.model.path, revision=config.model.revision), config.chat.system_prompt, config.chat.think
    )

    def tokens(pair: PreferencePair) -> TokenPair:
        prompt, chosen, rejected = renderer.pair_ids(pair)
        return TokenPair(
            chosen_ids=prompt + chosen,
            rejected_ids=prompt + rejected,
            prompt_length=len(prompt),
            margin=pair.margin,
            source=pair.source,
        )

    kept = {}
    for name, records in pairs.items():
        rendered = [tokens(pair) for pair in records]
        kept[name] = [p for p in rendered if max(len(p.chosen_ids), len(p.rejected_ids)) <= config.max_tokens]
        say(
            f"{len(kept[name]):,} {name} pairs, {len(rendered) - len(kept[name]):,} left out as longer than max_tokens {config.max_tokens}"
        )
        if not kept[name]:
            raise ValueError(f"all {name} pairs are longer than max_tokens {config.max_tokens}; raise it")
    with_margin = sum(pair.margin is not None for pair in kept["train"])
    if with_margin and config.margin_scale == 0:
        say(f"{with_margin:,} training pairs have a margin, which margin_scale 0 leaves out")
    statistics = train(config, train_pairs=kept["train"], heldout_pairs=kept["held-out"])
    say(
        f"held-out accuracy {statistics['accuracy']:.3f} over {statistics['num_pairs']} pairs\n{report_table(statistics)}"
    )
    run.finish(**statistics)


if __name__ == "__main__":
    run_stage(RewardModel, train_reward_model)
