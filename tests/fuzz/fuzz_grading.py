"""Coverage-guided fuzzing of the grader: `make fuzz`. It must never crash, and never need a second."""

import sys
import time
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["reward_models"]):
    from reward_models.grading.extraction import ACCEPT
    from reward_models.grading.grade import grade


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    accept = ACCEPT[provider.ConsumeIntInRange(0, len(ACCEPT) - 1)]
    boxed = provider.ConsumeBool()
    reference = provider.ConsumeUnicode(60)
    completion = provider.ConsumeUnicode(4000)
    started = time.process_time()  # not the clock on the wall: the machine may be busy with something else
    judged = grade(f"\\boxed{{{completion}}}" if boxed else completion, reference, accept=accept)
    if judged.reason.startswith("crashed") or time.process_time() - started > 1.0:
        raise AssertionError(f"{judged}: {completion!r} against {reference!r}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
