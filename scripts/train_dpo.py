"""DPO, IPO, cDPO, rDPO. `accelerate launch scripts/train_dpo.py --config recipes/tiny/dpo.yaml`"""

from train_orpo import load_pairs

from rlhf.config import DPO
from rlhf.run import Run, run_stage


def run_dpo(config: DPO, run: Run) -> None:
    renderer, examples, rows = load_pairs(config, run)
    from rlhf.trainers.dpo import train_dpo  # TRL takes seconds to import, and the pairs may be wrong

    figures = train_dpo(config, renderer.tokenizer, examples)
    run.finish(pairs=rows, **figures)


if __name__ == "__main__":
    run_stage(DPO, run_dpo)
