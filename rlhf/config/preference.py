"""The stages that train a policy on preference pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.stages import OfflineStage


class PreferenceTraining(OfflineStage):
    """What ORPO and DPO have in common."""

    pairs: str
    """Preference pairs, of people or made on policy."""


class ORPO(PreferenceTraining):
    """Odds-ratio preference optimisation (https://arxiv.org/abs/2403.07691), without a reference model (see rlhf/trainers/preference.py)."""

    stage: Literal["orpo"]
    odds_ratio_weight: Annotated[float, Field(ge=0)] = 0.1
    """Lambda: how much the odds ratio counts beside the likelihood of the chosen responses."""
    script: ClassVar[str] = "scripts/train_orpo.py"


class DPO(PreferenceTraining):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) and its relatives, with TRL's DPOTrainer."""

    stage: Literal["dpo"]
    loss: Literal["sigmoid", "length_normalised", "ipo", "conservative", "robust"] = "sigmoid"
    """`sigmoid` is DPO on sums of log-probabilities, `length_normalised` on their means over tokens, `ipo` the squared loss of
    https://arxiv.org/abs/2310.12036 on means, `conservative` cDPO and `robust` https://arxiv.org/abs/2403.00409, for labels of which a share is wrong."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How hard it is to leave the reference: large holds it fast. Of `ipo` it is tau."""
    wrong_labels: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose better response is thought to be the other one; of `conservative` and `robust`."""
    reference: Literal["precomputed", "frozen"] = "precomputed"
    """The model that training starts from: its log-probabilities of all pairs computed before the first step, or a frozen copy beside the
    policy, for when training sees a small part of the pairs only."""
    script: ClassVar[str] = "scripts/train_dpo.py"

    @model_validator(mode="after")
    def _wrong_labels_belong_to_two_losses(self) -> DPO:
        doubts = self.loss in ("conservative", "robust")
        if doubts != (self.wrong_labels > 0):
            problem = "so it would be plain DPO" if doubts else "which it does not read"
            raise ValueError(
                f"loss is {self.loss} and wrong_labels is {self.wrong_labels:g}, {problem}; set loss to conservative or robust together with wrong_labels above 0"
            )
        return self
