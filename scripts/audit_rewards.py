"""Whom the reward of a run favours. `python scripts/audit_rewards.py outputs/demo/grpo --by level`"""

import argparse
from pathlib import Path

from reward_models.audit import audit, audit_table, to_rows
from rlhf.completions import read_completions
from rlhf.run import faults_as_sentences, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a GRPO or PPO run")
    parser.add_argument("--by", required=True, metavar="COLUMN", help="level, subject, verdict, …")
    parser.add_argument("--first-batch", type=int, default=1)
    parser.add_argument("--last-batch", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    arguments = parser.parse_args()
    with faults_as_sentences():
        rows = read_completions(arguments.run, first=arguments.first_batch, last=arguments.last_batch)
        findings = audit(rows, arguments.by)
        if arguments.json:
            write_json(arguments.json, to_rows(findings))
        print(audit_table(findings, arguments.by))


if __name__ == "__main__":
    main()
