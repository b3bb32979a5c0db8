"""Process reward model. `accelerate launch scripts/train_process_reward_model.py --config recipes/tiny/process_reward_model.yaml`"""

from data.chat import ChatRenderer
from data.records import LabelledSteps, read_records
from reward_models.process import Solution, example_of, targets_of, train
from reward_models.processbench import first_wrong
from reward_models.steps import encode_steps, split_steps
from rlhf.config import ProcessRewardModel
from rlhf.models import check_model_path, load_tokenizer
from rlhf.run import Run, run_stage, say


def train_process_reward_model(config: ProcessRewardModel, run: Run) -> None:
    records = {
        name: read_records(LabelledSteps, path)
        for name, path in (("train", config.train_steps), ("held-out", config.heldout_steps))
    }
    targets = [
        targets_of(r.labels, r.values, soft=config.labels == "soft", after_first_error=config.after_first_error)
        for r in records["train"]
    ]
    check_model_path(config.model.path, "model.path")
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    renderer = ChatRenderer(tokenizer, config.chat.system_prompt, config.chat.think)

    def read(record: LabelledSteps) -> Solution:
        prompt = renderer.prompt_ids(record.question)
        input_ids, ends = encode_steps(
            prompt, record.steps, tokenizer, separator=config.separator, opening=config.opening
        )
        return Solution(input_ids=input_ids, start=len(prompt), ends=ends, first_error=first_wrong(record.labels))

    kept: dict[str, list[int]] = {}
    solutions: dict[str, list[Solution]] = {}
    for name, of_name in records.items():
        solutions[name] = [read(record) for record in of_name]
        kept[name] = [i for i, s in enumerate(solutions[name]) if len(s.input_ids) <= config.max_tokens]
        say(
            f"{len(kept[name]):,} {name} solutions, {len(of_name) - len(kept[name]):,} left out as longer than max_tokens {config.max_tokens}"
        )
        if not kept[name]:
            raise ValueError(f"all {name} solutions are longer than max_tokens {config.max_tokens}; raise it")
    cut = sum(any(len(split_steps(step, config.separator)) > 1 for step in r.steps) for r in records["train"])
    if cut:
        say(
            f"warning: {cut:,} of {len(records['train']):,} train solutions have a step with the separator {config.separator!r} in it, where a live "
            "completion would be cut; choose another separator if there are many"
        )
    figures = train(
        config,
        tokenizer,
        examples=[example_of(solutions["train"][i], targets[i]) for i in kept["train"]],
        heldout=[solutions["held-out"][i] for i in kept["held-out"]],
    )
    say(
        f"first wrong step found with F1 {figures['f1']['mean']:.3f} [{figures['f1']['low']:.3f}, {figures['f1']['high']:.3f}] over "
        f"{figures['num_solutions']} held-out solutions: {figures['erroneous']['mean']:.3f} of the erroneous, {figures['correct']['mean']:.3f} of the correct ones"
    )
    run.finish(**figures)


if __name__ == "__main__":
    run_stage(ProcessRewardModel, train_process_reward_model)
