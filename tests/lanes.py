"""Tests, in two processes at once with a thread each: most of a test's time is spent starting Python, which uses one core.

The first lane's output comes as it is made, the second's at the end.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECOND = (
    "tests/test_pipeline.py",
    "tests/test_stages.py",
    "tests/scripts",
    "tests/test_evaluate.py",
    "tests/data",
    "tests/rlhf/test_openai_server.py",
    "tests/rlhf/test_vllm_server.py",
)
"""About half of the time, and nothing that runs on two ranks."""


def main() -> int:
    root = Path(__file__).parents[1]
    # Threads that wait must not spin while the other lane computes.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    environment = {**os.environ, **threads}
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen([*pytest, *SECOND], cwd=root, env=environment, stdout=output, stderr=output)
        first = subprocess.run(
            [*pytest, *(f"--ignore={path}" for path in SECOND)], cwd=root, env=environment, check=False
        )
        print("\nthe second lane:", flush=True)
        code = second.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    return first.returncode or code


if __name__ == "__main__":
    sys.exit(main())
