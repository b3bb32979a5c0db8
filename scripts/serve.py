"""One vLLM server that samples for a run, kept up. `python scripts/serve.py RECIPE --host 10.0.0.5 --port 8400`

Name its URL under rollout.server.urls of the same recipe. It has no password and takes weights from whoever reaches it: private networks only.
"""

from __future__ import annotations

import argparse
import os
import sys

from rlhf.config import Online, load_config
from rlhf.rollout.serving import confine, keep_up, require_free_port, serve_command, serve_environment
from rlhf.run import faults_as_sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--devices", help="GPUs as CUDA_VISIBLE_DEVICES names them, or cores where there are none")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="end when the process that started this one does"
    )
    arguments = parser.parse_intermixed_args()
    with faults_as_sentences():
        config = load_config(arguments.recipe, arguments.overrides)
        if not isinstance(config, Online) or config.rollout.server is None:
            raise ValueError(
                f"{arguments.recipe} has no rollout.server; it is for recipes of train_grpo.py and train_ppo.py whose rollout.engine is server"
            )
        require_free_port(arguments.host, arguments.port)
        command = serve_command(config, host=arguments.host, port=arguments.port)
        confine(arguments.devices)
        parent = os.getppid() if arguments.die_with_parent else None
        environment = serve_environment(config, devices=arguments.devices)
        return keep_up(command, environment, url=f"http://{arguments.host}:{arguments.port}", parent=parent)


if __name__ == "__main__":
    sys.exit(main())
