"""Whether a completion's answer is the reference answer."""

from reward_models.grading.grade import Grade, grade

__all__ = ["Grade", "grade"]
