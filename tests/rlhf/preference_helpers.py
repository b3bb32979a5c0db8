"""Pairs of uneven lengths, and recipes small enough for a test."""

from pathlib import Path

from data.chat import render_response
from rlhf.config import load_config
from rlhf.trainers.preference import PairExample

RECIPES = Path(__file__).parents[2] / "recipes/tiny"


def make_pairs(renderer, demonstrations, count=8):
    """A worked solution against an answer at once, every other one the other way round."""
    pairs = []
    for i, d in enumerate(demonstrations[:count]):
        worked = renderer.response_ids(render_response(d.scratchpad, d.answer))
        at_once = renderer.response_ids(render_response("", d.answer))
        chosen, rejected = (worked, at_once) if i % 2 else (at_once, worked)
        pairs.append(PairExample(prompt_ids=renderer.prompt_ids(d.question), chosen_ids=chosen, rejected_ids=rejected))
    return pairs


def recipe(stage, folder, model, *overrides):
    folder.mkdir(exist_ok=True)
    small = [
        f"output_dir={folder}", f"model.path={model}", "training.num_steps=2", "training.sequences_per_step=8", "training.micro_batch_size=8",
        "training.log_every=1", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.0001", "optimizer.schedule=constant",
    ]  # fmt: skip
    return load_config(RECIPES / f"{stage}.yaml", [*small, *overrides])
