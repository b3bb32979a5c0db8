"""Supervised fine-tuning. `accelerate launch scripts/train_sft.py --config recipes/tiny/sft.yaml`"""

from data.chat import ChatRenderer, response_of
from data.records import Demonstration, read_records
from rlhf.config import SFT
from rlhf.models import check_model_path, load_tokenizer
from rlhf.run import Run, run_stage, say
from rlhf.trainers.sft import Example, train


def train_sft(config: SFT, run: Run) -> None:
    demonstrations = read_records(Demonstration, config.demonstrations)
    check_model_path(config.model.path, "model.path")
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    renderer = ChatRenderer(tokenizer, config.chat.system_prompt, config.chat.think)
    renderer.require_round_trip(demonstrations[0].question, response_of(demonstrations[0]))
    examples = [
        Example(prompt_ids=prompt, response_ids=response)
        for prompt, response in map(renderer.demonstration_ids, demonstrations)
    ]
    kept = [e for e in examples if len(e.input_ids) <= config.max_tokens]
    if not kept:
        raise ValueError(f"all {len(examples)} demonstrations are longer than max_tokens {config.max_tokens}; raise it")
    say(
        f"{len(kept):,} demonstrations, {len(examples) - len(kept):,} left out as longer than max_tokens {config.max_tokens}"
    )
    figures = train(config, tokenizer, kept, pad_token_id=renderer.pad_token_id)
    run.finish(**figures, num_demonstrations=len(kept), num_too_long=len(examples) - len(kept))


if __name__ == "__main__":
    run_stage(SFT, train_sft)
