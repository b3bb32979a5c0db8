"""What a run's curriculum did. `python scripts/plot_curriculum.py outputs/demo/grpo` prints pool sizes and draws curriculum.png there."""

import argparse
from pathlib import Path

from rlhf.curriculum_report import draw_curriculum, pool_table, require_measured
from rlhf.metrics import read_jsonl
from rlhf.run import faults_as_sentences, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a GRPO or PPO stage")
    parser.add_argument("--picture", type=Path, help="curriculum.png in the run's folder by default")
    given = parser.parse_args()
    with faults_as_sentences():
        file = given.run / "metrics.jsonl"
        if not file.is_file():
            raise ValueError(f"{file} does not exist; name the output_dir of a GRPO or PPO stage")
        rows = read_jsonl(file)
        require_measured(rows, str(file))
        say(pool_table(rows))
        picture = given.picture or given.run / "curriculum.png"
        draw_curriculum(rows, picture)
        say(f"{picture}: pool sizes and pass rates over {len(rows)} rollout batches")


if __name__ == "__main__":
    main()
