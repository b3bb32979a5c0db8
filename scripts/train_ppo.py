"""Proximal policy optimisation with a critic. `accelerate launch scripts/train_ppo.py --config recipes/tiny/ppo.yaml`"""

from train_grpo import train_online

from rlhf.config import PPO
from rlhf.run import run_stage

if __name__ == "__main__":
    run_stage(PPO, train_online)
