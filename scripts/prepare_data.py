"""Turn a source into record files. `python scripts/prepare_data.py --config recipes/tiny/prepare_data.yaml`"""

import dataclasses

from data.catalog import SOURCES
from data.chat import render_response
from data.records import write_records
from rlhf.config import PrepareData
from rlhf.run import Run, format_table, run_stage, say


def prepare_data(config: PrepareData, run: Run) -> None:
    options = config.source.model_dump(exclude={"name"})
    prepared = SOURCES[config.source.name](
        seed=config.seed,
        demonstrations=config.num_demonstrations,
        train_problems=config.num_train_problems,
        test_problems=config.num_test_problems,
        train_pairs=config.num_preference_pairs,
        heldout_pairs=config.num_preference_pairs // 10 + 1,
        **options,
    )
    counts = {
        f.name: write_records(getattr(prepared, f.name), run.folder / f"{f.name}.jsonl")
        for f in dataclasses.fields(prepared)
    }
    say(format_table([(f"{name}.jsonl", f"{count:,} records") for name, count in counts.items()]))
    for demonstration in prepared.demonstrations[:2]:
        say(f"\n{demonstration.question}\n{render_response(demonstration.scratchpad, demonstration.answer)}")
    run.finish(records=counts)


if __name__ == "__main__":
    run_stage(PrepareData, prepare_data)
