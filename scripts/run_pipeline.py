"""All stages in order. `python scripts/run_pipeline.py --config recipes/tiny/pipeline.yaml`"""

from rlhf.config import Pipeline
from rlhf.pipeline import run_pipeline
from rlhf.run import run_stage

if __name__ == "__main__":
    run_stage(Pipeline, run_pipeline)
