"""Whether a completion's answer is the reference answer.

extraction    completion -> the part that is its answer
notation      LaTeX or plain text -> tokens
syntax        tokens -> tree
values        tree -> exact or many-digit value
equivalence   two answers -> equal or not, and by which rule
grade         all of it: a verdict, never an exception
pool          the same in killable processes with limits on time and memory
"""

from reward_models.grading.equivalence import canonical
from reward_models.grading.grade import VERSION, Grade, grade
from reward_models.grading.pool import GraderPool

__all__ = ["VERSION", "Grade", "GraderPool", "canonical", "grade"]
