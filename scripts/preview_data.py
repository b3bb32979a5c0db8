"""Print records as a model is trained on them, each token coloured by whether the loss is on it.

    python scripts/preview_data.py --data outputs/demo/data/demonstrations.jsonl --kind demonstrations --model outputs/demo/base

Green: learnt. Red: learnt to avoid, or a step labelled as wrong. Dim: the prompt, which nothing is learnt from.
"""

import argparse
import os
import random
import sys

from data.chat import ChatRenderer
from data.preview import parts_of, show
from data.records import KINDS, read_records
from rlhf.models import load_tokenizer
from rlhf.run import faults_as_sentences, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL or parquet file of records")
    parser.add_argument("--kind", required=True, choices=sorted(KINDS))
    parser.add_argument("--model", required=True, help="folder or hub name whose tokenizer and chat template are used")
    parser.add_argument("--system-prompt")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    arguments = parser.parse_args()
    with faults_as_sentences():
        renderer = ChatRenderer(load_tokenizer(arguments.model), arguments.system_prompt)
        records = read_records(KINDS[arguments.kind], arguments.data)
    wanted = arguments.colour == "always" or (arguments.colour == "auto" and sys.stdout.isatty())
    colour = wanted and "NO_COLOR" not in os.environ
    for record in random.Random(arguments.seed).sample(records, min(arguments.count, len(records))):
        say(f"── {record.id}")
        for parts in parts_of(record, renderer):
            say(show(parts, renderer, colour=colour) + "\n")


if __name__ == "__main__":
    main()
