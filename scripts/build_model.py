"""Train a tokenizer and initialise a small model. `python scripts/build_model.py --config recipes/tiny/build_model.yaml`"""

from data.chat import ChatRenderer, render_response
from data.records import Demonstration, read_records
from data.tokenizer import train_tokenizer
from rlhf.config import BuildModel
from rlhf.models import build_qwen3
from rlhf.run import Run, run_stage, say


def build_model(config: BuildModel, run: Run) -> None:
    demonstrations = read_records(Demonstration, config.demonstrations)
    texts = [f"{d.question} {render_response(d.scratchpad, d.answer)}" for d in demonstrations]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    ChatRenderer(tokenizer).require_round_trip(demonstrations[0].question, texts[0])
    model = build_qwen3(config.architecture, tokenizer, seed=config.seed)
    model.save_pretrained(run.folder)
    tokenizer.save_pretrained(run.folder)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{model.config.model_type} with {parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    run.finish(num_parameters=parameters, vocab_size=len(tokenizer))


if __name__ == "__main__":
    run_stage(BuildModel, build_model)
