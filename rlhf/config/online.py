"""The stages of reinforcement learning: grpo and ppo."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.algorithm import Algorithm, Critic, GroupAlgorithm, PPOAlgorithm, Reference
from rlhf.config.curriculum import Curriculum, Replay, UniformCurriculum
from rlhf.config.models import Policy
from rlhf.config.retention import Retention, require_controls
from rlhf.config.rewards import ModelReward, ProcessRewardModelReward, Reward, RuleReward
from rlhf.config.sections import (
    Chat,
    Grader,
    Optimizer,
    PositiveInt,
    Rollout,
    Schedule,
    Section,
    Share,
    nearest,
    scheduled,
)
from rlhf.metrics import MEANING


class Guards(Section):
    """Bounds whose breach stops the run with a sentence, before a checkpoint is written."""

    max_kl_sampler: Annotated[float, Field(gt=0)] = 0.05
    """Nats per token between the engine that samples and the trainer, on policy."""
    max_router_disagreement: Share = 0.25
    """Share of (token, layer) of a mixture that may go to other experts in the engine than in the trainer, on policy; in bfloat16 a tenth is
    usual. Measured with rollout.record_experts."""
    max_undecided_share: Share = 0.1
    """Share of completions the grader may fail to judge."""
    max_kl_stale: Annotated[float, Field(gt=0)] = 1.0
    """The same bound for rollouts of an older policy, with training.max_staleness above 0 or replay."""
    freshness_tolerance: Annotated[float, Field(gt=0)] = 0.05
    """Mean absolute difference, in nats, between the engine's and the trainer's log-probabilities of a probe after each sync."""


class Watch(Section):
    """Signs that the policy games its reward, looked for after every rollout batch (see rlhf/watch.py, which says what each is)."""

    action: Literal["off", "warn", "stop"] = "warn"
    """What an alarm does, besides a line on the console, a row in alarms.jsonl and a file with the ten completions that show it best."""
    window: Annotated[int, Field(ge=3)] = 5
    """Rollout batches whose mean is compared with that of as many others."""
    significance: Annotated[float, Field(gt=0)] = 3.0
    """Standard errors that a difference of means must have."""
    max_correctness_loss: Share = 0.1
    """That correctness may lose against its best window while the reward rises."""
    max_surface_share: Share = 0.5
    """Of the variance behind the advantages, by components of the kinds format, length, overlong, repetition, cosine and target_length."""
    max_repetition: Share = 0.3
    """Share of the 8-grams of tokens that stood in the completion before; an alarm also needs twice that of the first window."""
    max_kl_slope: Annotated[float, Field(gt=0)] = 0.01
    """Nats per token and optimizer step, with a reference."""
    min_spread: Share = 0.25
    """Of the standard deviation within groups in the first window."""
    min_distinct: Share = 0.25
    """Of the different scratchpads of a prompt in the first window."""
    max_length_growth: Annotated[float, Field(gt=1)] = 2.0
    """Factor over the mean length in the first window."""
    ceiling: Share = 0.9
    """Correctness above which only divergence is an alarm: what is left to compare is form."""


class RolloutServer(Section):
    """vLLM servers that sample: on other hosts or GPUs, or on other cores of this one (see docs/guides/servers.md)."""

    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^/]+$")], ...] = ()
    """Of replicas that scripts/serve.py started elsewhere. Without any, the main process starts `replicas` here."""
    replicas: PositiveInt = 1
    first_port: Annotated[int, Field(ge=1024, le=65_000)] = 8400
    """Replicas started here listen on it and on the ports after it, on the loopback interface."""
    devices: tuple[str, ...] = ()
    """What each replica started here may use, such as "4,5": its CUDA_VISIBLE_DEVICES, or its cores on a CPU."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the weights."""
    data_parallel: PositiveInt = 1
    """Copies of the weights behind one URL."""
    weights: Literal["folder", "nccl"] = "folder"
    """How new weights get there: as files in a folder that every host sees, or from GPU to GPU."""
    folder: str | None = None
    """For the files; by default in memory for replicas started here, and under output_dir for others."""
    update_in_flight: bool = False
    """Replace the weights in the middle of completions instead of waiting for their end (https://arxiv.org/abs/2509.19128); asynchronous only."""
    request_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """After which a request goes to another replica."""
    patience_seconds: Annotated[float, Field(gt=0)] = 900.0
    """How long the run waits when no replica answers, starting included."""

    @model_validator(mode="after")
    def _devices_of_each(self) -> RolloutServer:
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(
                f"devices names {len(self.devices)} sets and replicas is {self.replicas}; give one for each"
            )
        if self.urls and self.devices:
            raise ValueError("devices is for replicas started here, and urls names others; remove one of them")
        return self


class OnlineRollout(Rollout):
    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    server: RolloutServer | None = None
    """For the engine `server`."""
    prompts_per_batch: PositiveInt
    """Over all ranks. A rollout batch is sampled by one policy version."""
    temperature_schedule: Schedule | None = None
    """From `temperature` on, a rollout batch is sampled, and its log-probabilities are taken, at a temperature of its own."""
    record_experts: bool = False
    """Note which experts of a mixture the engine sent each token to: policy.router_replay needs it, moe/disagreement is measured with it.
    On a CPU the engine then computes a prompt once for each sample."""
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    """How often groups without signal are replaced by fresh prompts' groups before training: dynamic sampling (DAPO,
    https://arxiv.org/abs/2503.14476, section 3.2) with a budget. What is left without signal after the last round stays."""

    def temperature_at(self, batch: int) -> float:
        """The temperature of rollout batch number `batch`, from 0: of its samples, and of every log-probability in training on them."""
        return scheduled(self.temperature, self.temperature_schedule, batch + 1)

    @model_validator(mode="after")
    def _temperature_above_0(self) -> OnlineRollout:
        if self.temperature_schedule is not None and self.temperature_schedule.to <= 0:
            raise ValueError(
                f"rollout.temperature_schedule.to is {self.temperature_schedule.to}, where nothing is left to chance; set it above 0"
            )
        return self

    @model_validator(mode="after")
    def _server_has_its_section(self) -> OnlineRollout:
        if (self.engine == "server") != (self.server is not None):
            problem = (
                "there is no rollout.server"
                if self.server is None
                else "rollout.server is set, which nothing would read"
            )
            raise ValueError(
                f"rollout.engine is {self.engine} and {problem}; give both (server: {{}} starts one here) or neither"
            )
        if self.engine == "server" and self.record_experts:
            raise ValueError(
                "rollout.record_experts is set and rollout.engine is server, whose experts are not read; set engine to vllm"
            )
        return self


class OnlineTraining(Section):
    num_batches: PositiveInt
    """Rollout batches."""
    minibatches_per_batch: PositiveInt = 1
    """Optimizer steps per pass over a rollout batch; beyond the first the data is off policy."""
    passes_per_batch: PositiveInt = 1
    tokens_per_micro_batch: PositiveInt
    """Tokens per rank and forward pass, padding included: the memory knob. It never changes the gradient."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Rollout batches that are sampled while older ones are trained on: asynchronous training on rollouts of a policy at most so many batches old.
    0 is the synchronous loop."""
    layout: Literal["shared", "padded"] = "shared"
    """`shared` computes a prompt once for all its completions and pads nothing, where the model's attention allows it."""
    checkpoint_every: PositiveInt = 10
    """Rollout batches between checkpoints."""
    checkpoint_every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints, besides those; also in the middle of a rollout batch, which is then stored with the rest."""
    completions_every: Annotated[int, Field(ge=0)] = 1
    """Rollout batches between those whose completions are kept for reading and audits, with every component of their rewards; 0 keeps none."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many stay."""
    keep_best: str | None = None
    """Key of a metric, such as reward/correctness: the checkpoint whose last finished rollout batch has its highest value stays as well, and its
    weights end up under `best` in output_dir."""


class Online(Section):
    """Reinforcement learning with verifiable and learned rewards, in this project's own loop."""

    output_dir: str
    seed: int = 0
    policy: Policy
    reference: Reference | None = None
    chat: Chat = Chat()
    problems: str
    demonstrations: str
    """Reference solutions: before training they must earn the full reward, and after each weight push both sides score some of them."""
    curriculum: Curriculum = UniformCurriculum()
    """Which problems come next (docs/guides/curriculum.md)."""
    replay: Replay | None = None
    """Off without it."""
    rollout: OnlineRollout
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    grader: Grader = Grader()
    algorithm: Algorithm
    training: OnlineTraining
    optimizer: Optimizer
    guards: Guards = Guards()
    watch: Watch = Watch()
    retention: Retention = Retention()

    @property
    def component_names(self) -> list[str]:
        """Of the rewards, in their order."""
        return [reward.name for reward in self.rewards]

    @model_validator(mode="after")
    def _reference_has_a_coefficient(self) -> Online:
        if self.algorithm.kl_coefficient > 0 and self.reference is None:
            raise ValueError(
                f"algorithm.kl_coefficient is {self.algorithm.kl_coefficient} but reference is not set; "
                "name the weights under reference.path or set algorithm.kl_coefficient to 0"
            )
        if self.algorithm.kl_coefficient == 0 and self.reference is not None:
            raise ValueError(
                "reference is set but algorithm.kl_coefficient is 0, so nothing would read it; remove reference or raise the coefficient"
            )
        if self.reference is not None:
            kind, lora = self.reference.kind, self.policy.lora is not None
            if (kind == "lora_base" and not lora) or (kind == "moving_average" and lora):
                raise ValueError(
                    f"reference.kind is {kind} and policy.lora is {'set' if lora else 'not set'}; with LoRA take lora_base or frozen, "
                    "without it frozen or moving_average"
                )
        return self

    @model_validator(mode="after")
    def _replayed_experts_are_recorded(self) -> Online:
        if self.policy.router_replay and not self.rollout.record_experts:
            raise ValueError(
                "policy.router_replay is set but rollout.record_experts is not, so there would be nothing to replay; set it"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_cut(self) -> Online:
        if self.rollout.prompts_per_batch % self.training.minibatches_per_batch:
            raise ValueError(
                f"rollout.prompts_per_batch is {self.rollout.prompts_per_batch}, not a multiple of training.minibatches_per_batch "
                f"{self.training.minibatches_per_batch}; whole groups go into each optimizer step"
            )
        if self.training.tokens_per_micro_batch < self.rollout.max_prompt_tokens + self.rollout.max_new_tokens:
            raise ValueError(
                f"training.tokens_per_micro_batch is {self.training.tokens_per_micro_batch}, less than one sequence of "
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {self.rollout.max_prompt_tokens + self.rollout.max_new_tokens}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _older_policies_sample_elsewhere(self) -> Online:
        staleness, server = self.training.max_staleness, self.rollout.server
        if staleness > 0 and self.rollout.engine != "server":
            raise ValueError(
                f"training.max_staleness is {staleness} and rollout.engine is {self.rollout.engine}, which samples in the process that trains; "
                "set rollout.engine to server, or max_staleness to 0"
            )
        if staleness > 0 and self.algorithm.sampler_correction == "none":
            raise ValueError(
                f"training.max_staleness is {staleness} and algorithm.sampler_correction is none: rollouts of an older policy would be "
                "trained on as if they were its own; set it to truncate or mask"
            )
        if staleness > 0 and any(isinstance(r, ModelReward) and r.placement == "sharded" for r in self.rewards):
            raise ValueError(
                f"training.max_staleness is {staleness} and rewards.reward_model.placement is sharded: its ranks score together, which "
                "would collide with training; set it to whole"
            )
        if staleness == 0 and server is not None and server.update_in_flight:
            raise ValueError(
                "rollout.server.update_in_flight is true and training.max_staleness is 0, so no completion is ever in flight; raise it to 1"
            )
        return self

    @model_validator(mode="after")
    def _server_takes_whole_weights(self) -> Online:
        if self.rollout.server is not None and self.policy.lora is not None and self.policy.lora.sync == "adapter":
            raise ValueError(
                "policy.lora.sync is adapter and rollout.engine is server, which takes whole weights; set sync to merged"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit_what_they_judge(self) -> Online:
        for reward in self.rewards:
            if isinstance(reward, RuleReward) and (reward.buffer_tokens or 0) > self.rollout.max_new_tokens:
                raise ValueError(
                    f"rewards.{reward.name}.buffer_tokens is {reward.buffer_tokens}, more than rollout.max_new_tokens {self.rollout.max_new_tokens}; "
                    "every completion would be punished: lower it"
                )
            if (
                self.algorithm.step_credit == "min"
                and isinstance(reward, ProcessRewardModelReward)
                and reward.aggregate is None
                and reward.step_value == "probability"
            ):
                raise ValueError(
                    f"algorithm.step_credit is min and rewards.{reward.name}.step_value is probability: what follows the worst step counts 0, which no "
                    "probability is below, so right steps would be held down; set step_value to signed"
                )
        return self

    @model_validator(mode="after")
    def _components_and_their_gates(self) -> Online:
        names = self.component_names
        if len(set(names)) != len(names):
            raise ValueError(
                f"rewards name the same component twice: {', '.join(names)}; merge them, or give each a name and say under kind what it is"
            )
        taken = [name for name in names if f"reward/{name}" in MEANING and name != "correctness"]
        if taken:
            raise ValueError(
                f"rewards names a component {taken[0]!r}, which is a metric of its own; choose another name"
            )
        for reward in self.rewards:
            for gate in reward.gates:
                if gate.component not in names or gate.component == reward.name:
                    problem = "itself" if gate.component == reward.name else "no component"
                    others = [name for name in names if name != reward.name]
                    raise ValueError(
                        f"rewards.{reward.name}.gates names {gate.component!r}, which is {problem}; {nearest(gate.component, others)}"
                    )
        return self

    @model_validator(mode="after")
    def _best_is_by_a_metric(self) -> Online:
        metrics = [*MEANING, *(f"reward/{name}" for name in self.component_names)]
        if self.training.keep_best is not None and self.training.keep_best not in metrics:
            raise ValueError(
                f"training.keep_best is {self.training.keep_best!r}, which is no metric; {nearest(self.training.keep_best, metrics)}"
            )
        return self

    @model_validator(mode="after")
    def _correctness_is_a_component(self) -> Online:
        if not any(reward.name == reward.kind == "correctness" for reward in self.rewards):
            raise ValueError(
                f"rewards has no correctness component (has: {', '.join(self.component_names)}); add it, with weight 0 if it is only to be reported"
            )
        return self

    @model_validator(mode="after")
    def _controls_of_forgetting(self) -> Online:
        require_controls(self)
        return self


class GRPO(Online):
    """The members of the family that compare the samples of a prompt: GRPO, Dr. GRPO, RLOO, DAPO, REINFORCE++, GSPO, CISPO, SAPO, GDPO."""

    stage: Literal["grpo"]
    algorithm: GroupAlgorithm = GroupAlgorithm()  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    script: ClassVar[str] = "scripts/train_grpo.py"

    @model_validator(mode="after")
    def _groups(self) -> GRPO:
        if self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"group_relative compares samples of one prompt and rollout.samples_per_prompt is {self.rollout.samples_per_prompt}; set it to 2 or more"
            )
        if self.replay is not None and self.algorithm.sampler_correction == "none":
            raise ValueError(
                "replay brings back completions of older policies and algorithm.sampler_correction is none: they would be trained on as if they were the "
                "policy's own; set it to truncate or mask"
            )
        if self.replay is not None and self.replay.per_group >= self.rollout.samples_per_prompt:
            raise ValueError(
                f"replay.per_group is {self.replay.per_group} of rollout.samples_per_prompt {self.rollout.samples_per_prompt}, so no completion of now would be left; "
                "lower it"
            )
        if self.replay is not None and self.rollout.record_experts:
            raise ValueError(
                "replay brings back completions that the routers of older policies sent elsewhere, and rollout.record_experts compares them; remove one of them"
            )
        if (self.algorithm.pass_at or 0) > self.rollout.samples_per_prompt:
            raise ValueError(
                f"algorithm.pass_at is {self.algorithm.pass_at}, more than rollout.samples_per_prompt {self.rollout.samples_per_prompt}; lower it"
            )
        if self.algorithm.pass_at is not None and any(reward.kind == "process_reward_model" for reward in self.rewards):
            raise ValueError(
                "algorithm.advantage is pass_at_k, which compares whole completions, and a reward judges steps; take another advantage"
            )
        return self


class PPO(Online):
    """Proximal policy optimisation with a critic."""

    stage: Literal["ppo"]
    algorithm: PPOAlgorithm = PPOAlgorithm()  # type: ignore[reportIncompatibleVariableOverride]
    critic: Critic
    script: ClassVar[str] = "scripts/train_ppo.py"

    @model_validator(mode="after")
    def _warmup(self) -> PPO:
        if self.critic.warmup_batches >= self.training.num_batches:
            raise ValueError(
                f"critic.warmup_batches is {self.critic.warmup_batches} of training.num_batches {self.training.num_batches}, so the policy would never be trained; lower it"
            )
        if self.replay is not None:
            raise ValueError("replay mends groups without signal; with a critic every completion has one: remove it")
        if self.rollout.refill_rounds:
            raise ValueError(
                "rollout.refill_rounds replaces groups without signal; with a critic every completion has one: set it to 0"
            )
        return self
