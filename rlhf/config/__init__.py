"""The recipe schema, one file a subject.

A recipe is YAML with a `stage` key that names its root class. `extends: other.yaml` is read first and overlaid; overrides
come last. Unknown keys, wrong types and contradictions are errors that name the key and its repair. Nothing here imports torch.
"""

from rlhf.config.algorithm import *
from rlhf.config.arithmetic import *
from rlhf.config.curriculum import *
from rlhf.config.data import *
from rlhf.config.evaluation import *
from rlhf.config.loading import *
from rlhf.config.models import *
from rlhf.config.offline import *
from rlhf.config.online import *
from rlhf.config.preference import *
from rlhf.config.retention import *
from rlhf.config.rewards import *
from rlhf.config.samples import *
from rlhf.config.sections import *
from rlhf.config.stages import *
from rlhf.config.thinking import *
