"""The online loop: sample a rollout batch, score it, take optimizer steps on it, push the weights, repeat.

    prompts ─engine.generate─▶ rollouts ─reward_fn─▶ scores ─estimate─▶ advantages of tokens
      ─pack─▶ micro-batches ─policy─▶ logprobs ─policy loss─▶ per token ─▶ sum of weight x loss

Notation: a rollout batch has P prompts x G samples, all sampled by one policy version; it is trained on in `minibatches_per_batch`
optimizer steps, `passes_per_batch` times (rlhf/updater.py). GRPO, PPO and their family differ in where advantages come from
(rlhf/experience.py), in the policy loss, in where the KL penalty goes, and in whether there is a critic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rlhf import training_state
from rlhf.ahead import Ahead
from rlhf.checkpoint import best_whole, newest_whole, read_state, save_checkpoint, sync_to_disk
from rlhf.completions import batch_file, completion_rows, drop_from, write_rows
from rlhf.config import Online
from rlhf.curriculum import Choice, Curriculum, outcomes
from rlhf.distributed import gather, second_group
from rlhf.experience import Experience, Ranks, describe, describe_advantages, estimate, has_signal
from rlhf.guards import require_fresh, require_judged, require_one_policy
from rlhf.lora import save_model
from rlhf.metrics import Metrics, append_jsonl, console_line, read_jsonl, reduce_metrics, truncate_jsonl
from rlhf.quantization import has_quantised
from rlhf.replay import ReplayBuffer, successes
from rlhf.retention import NOTHING, Remembered
from rlhf.rollout.engine import RolloutEngine, Sampling
from rlhf.rollout_buffer import RolloutBuffer, unjudged
from rlhf.run import Run, git_revision, peak_memory_gb, say
from rlhf.types import Prompt, RewardFn, Rollout, ScheduledReward, Score
from rlhf.updater import Updater
from rlhf.watch import Alarm, Watch, record_alarms
from rlhf.weight_sync import Freshness, Probe, WeightSync, send_weights

PARTS = ("rollout", "reward", "train", "sync")
"""Of a rollout batch's time."""


class OnlineTrainer:
    """Trains a policy by reinforcement learning: the group-relative family (https://arxiv.org/abs/2402.03300) and PPO.

    Args:
        config: the recipe.
        accelerator: as `rlhf.distributed.start` made it.
        policy: causal language model with float weights, its adapters already in it.
        reference: the frozen model of `reference.path`, or None.
        critic: the value model of PPO, or None.
        engine: holds the same weights as `policy`.
        prompts: every problem, rendered.
        reward_fn: scores rollouts; runs on every rank on that rank's rollouts.
        probes: sequences for the freshness check.
        pad_token_id: of the tokenizer.
        run: where metrics and checkpoints go.
        remembered: what the recipe's controls of forgetting are about.
    """

    def __init__(
        self,
        config: Online,
        accelerator: Accelerator,
        *,
        policy: Any,
        reference: Any | None = None,
        critic: Any | None = None,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        reward_fn: RewardFn,
        probes: Sequence[Probe],
        pad_token_id: int,
        run: Run,
        remembered: Remembered = NOTHING,
    ) -> None:
        self.config, self.accelerator, self.engine = config, accelerator, engine
        self.prompts, self.reward_fn, self.run = prompts, reward_fn, run
        self.updater = Updater(
            config,
            accelerator,
            policy=policy,
            reference=reference,
            critic=critic,
            pad_token_id=pad_token_id,
            remembered=remembered,
        )
        self.first_batch = self.prompts_used = 0
        self.curriculum = Curriculum(config.curriculum, prompts, seed=config.seed)
        self.replay = ReplayBuffer(config.replay, config.rollout.samples_per_prompt) if config.replay else None
        self.watch = Watch.of(config)
        self.last_row: dict[str, float] = {}
        self.under_way: RolloutBuffer | None = None
        """The rollout batch that a resumed run goes on with."""
        waiting: dict[int, RolloutBuffer] = {}
        checkpoint = newest_whole(accelerator, self.checkpoints)
        if checkpoint is not None:
            waiting = self._restore(checkpoint)
        # Servers hold no weights of ours yet, and what an engine loaded is not a quantised base.
        if checkpoint is not None or engine.policy_version != self.policy_version or has_quantised(self.unwrapped):
            send_weights(engine, self.unwrapped, policy_version=self.policy_version)
        self._sampling_group: Any = None
        self.ahead: Ahead | None = None
        if config.training.max_staleness > 0:
            self._sampling_group = second_group(accelerator)
            first = self.first_batch + (self.under_way is not None)
            self.ahead = Ahead(self.fill, first=first, ready=waiting)
        if accelerator.is_main_process:
            for file in (self.metrics_file, self.alarms_file):
                truncate_jsonl(file, key="batch", below=self.first_batch + 1)
            drop_from(self.run.folder, self.first_batch + 1)
        self.sync = WeightSync(engine, self.unwrapped, probes, tolerance=config.guards.freshness_tolerance)

    @property
    def unwrapped(self) -> Any:
        """The policy's model."""
        return self.updater.unwrapped

    @property
    def policy_version(self) -> int:
        return self.updater.policy_version

    @property
    def checkpoints(self) -> Path:
        return self.run.folder / "checkpoints"

    @property
    def alarms_file(self) -> Path:
        return self.run.folder / "alarms.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.run.folder / "metrics.jsonl"

    # ---------------------------------------------------------------------------------------------------------------- the loop

    def train(self) -> list[dict[str, float]]:
        """All rollout batches that are left; returns the metrics of each.

        Raises:
            RuntimeError: when a guard's bound is breached; the last checkpoint stays valid.
            FloatingPointError: when a loss or gradient is not finite.
        """
        training = self.config.training
        history = []
        self._look_back(0, Metrics())
        for batch in range(self.first_batch, training.num_batches):
            if self.ahead is not None:
                self.ahead.go_to(min(batch + training.max_staleness, training.num_batches - 1))
            buffer, self.under_way = self.under_way or self._next(batch), None
            self._update(buffer, batch)
            metrics, seconds = buffer.metrics, buffer.seconds
            with _timed(seconds, "sync"):
                freshness = self._push()
            require_one_policy(gather(self.accelerator, [freshness.level]))
            self._look_back(batch + 1, metrics)
            metrics.add("sync/error", total=freshness.error, count=1)
            _describe_costs(buffer.experience, seconds, metrics)
            row = {"batch": batch + 1, "step": self.policy_version, **self._means(metrics)}
            alarms = self._look(buffer.experience, row)
            self.last_row = row
            history.append(row)
            if self.accelerator.is_main_process:
                append_jsonl(self.metrics_file, row)
            say(console_line(row, training.num_batches))
            self._raise(alarms)
            due = (batch + 1) % training.checkpoint_every == 0 or self._step_is_due(batch + 1, 0)
            if due and batch + 1 < training.num_batches:
                self._checkpoint(batch + 1)
        return history

    def fill(self, batch: int) -> RolloutBuffer:
        """Rollout batch number `batch`, sampled and scored."""
        metrics = Metrics()
        seconds: dict[str, float] = {part: 0.0 for part in PARTS}
        rollouts, scores = self.collect(batch, metrics, seconds)
        return unjudged(rollouts, scores, metrics, seconds)

    def _next(self, batch: int) -> RolloutBuffer:
        """Rollout batch number `batch`, judged. Of one sampled ahead, the time counts that the loop had to wait for it."""
        if self.ahead is None:
            buffer = self.fill(batch)
        else:
            waited = {part: 0.0 for part in PARTS}
            with _timed(waited, "rollout"):
                buffer = self.ahead.take(batch)
            took = buffer.seconds["rollout"] + buffer.seconds["reward"]
            buffer.metrics.add("rollout/hidden", total=max(took - waited["rollout"], 0.0), count=took)
            buffer.seconds = waited
        rollouts, scores = buffer.experience.rollouts, buffer.experience.scores
        require_fresh(rollouts, self.policy_version, max_age=self._max_age)
        buffer.metrics.add(
            "rollout/age", total=sum(self.policy_version - r.policy_version for r in rollouts), count=len(rollouts)
        )
        if self.replay is not None:
            size = self.config.rollout.samples_per_prompt
            fresh = gather(self.accelerator, successes(rollouts, scores, size=size, batch=batch))
            rollouts, scores = self.replay.rescue(rollouts, scores, batch=batch, metrics=buffer.metrics)
            self.replay.add(fresh)
        with _timed(buffer.seconds, "reward"):
            buffer.experience = self.judge(rollouts, scores, buffer.metrics, batch)
        return buffer

    @property
    def _max_age(self) -> int:
        """Optimizer steps the trainer may be ahead of the policy that sampled."""
        return self.config.training.max_staleness * self.updater.steps_per_batch

    def _push(self) -> Freshness:
        """The policy to the engine; between two rollout batches, unless its completions may go on with other weights than they began with."""
        server = self.config.rollout.server
        in_flight = server is not None and server.update_in_flight
        with nullcontext() if self.ahead is None or in_flight else self.ahead.between_batches():
            return self.sync.push(policy_version=self.policy_version)

    def _look_back(self, batch: int, metrics: Metrics) -> None:
        """After `batch` rollout batches: what is left of the held-out ability, where the recipe asks, and the coefficient that follows it."""
        if self.updater.retention.is_due(batch):
            with nullcontext() if self.ahead is None else self.ahead.between_batches():
                self.updater.retention.look(self.engine, self.accelerator, metrics)
            self.updater.follow_ability()

    def _update(self, buffer: RolloutBuffer, batch: int) -> None:
        """The optimizer steps that are left on a rollout batch, with checkpoints between them."""
        started = time.perf_counter()

        def after_step(steps_taken: int) -> None:
            nonlocal started
            if self._step_is_due(batch, steps_taken):
                buffer.seconds["train"] += time.perf_counter() - started
                experience = self.updater.under_way(buffer.experience)
                self._checkpoint(batch, RolloutBuffer(experience, buffer.metrics, buffer.seconds, steps_taken))
                started = time.perf_counter()

        self.updater.update(
            buffer.experience, buffer.metrics, batch=batch, steps_taken=buffer.steps_taken, after_step=after_step
        )
        buffer.seconds["train"] += time.perf_counter() - started

    def _look(self, experience: Experience, row: dict[str, float]) -> list[Alarm]:
        """The alarms of a rollout batch, which are the same on every rank, and its completions in files; adds to its metrics."""
        batch, every = int(row["batch"]), self.config.training.completions_every
        alarms: list[Alarm] = []
        if self.config.watch.action != "off":
            row |= self.watch.measure(row)
            alarms = self.watch.look(row)
        is_due = every > 0 and batch % every == 0
        if is_due or alarms:
            rows = gather(self.accelerator, completion_rows(experience, batch))
            if self.accelerator.is_main_process and is_due:
                write_rows(batch_file(self.run.folder, batch), rows)
            if self.accelerator.is_main_process:
                record_alarms(self.run.folder, self.watch, alarms, rows)
        return alarms

    def _raise(self, alarms: Sequence[Alarm]) -> None:
        """Say what was seen, and stop where the recipe wants that.

        Raises:
            RuntimeError: with `watch.action: stop`.
        """
        for alarm in alarms:
            say(alarm.line(self.run.folder))
        if alarms and self.config.watch.action == "stop":
            raise RuntimeError(
                f"stopped by watch.action: {alarms[0].line(self.run.folder)}. Nothing after the last checkpoint is kept: repair the reward, or set "
                "watch.action to warn"
            )

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    def _step_is_due(self, batch: int, steps_taken: int) -> bool:
        every = self.config.training.checkpoint_every_steps
        return every is not None and (batch * self.updater.steps_per_batch + steps_taken) % every == 0

    def _checkpoint(self, batch: int, buffer: RolloutBuffer | None = None) -> None:
        """After `batch` rollout batches and the steps on the one in `buffer`, if there is one."""
        training, rank = self.config.training, self.accelerator.process_index
        step = batch * self.updater.steps_per_batch + (buffer.steps_taken if buffer is not None else 0)
        # Those sampled ahead came from weights that are gone, so they are kept; and only now is it known how many prompts they took.
        waiting_batches = self.ahead.all_that_wait() if self.ahead is not None else {}
        learners = self.updater.learners
        files = training_state.collect(learners, self.updater.followers)
        replayed: dict[str, Any] | None = None
        if self.replay is not None:
            files["replay"], replayed = self.replay.to_files()
        state = {
            **self.updater.state(),
            "step": step,
            "batch": batch,
            "prompts_used": self.prompts_used,
            "curriculum": self.curriculum.state(),
            "replay": replayed,
            "learners": training_state.schedules(learners),
            "ranks": self.accelerator.num_processes,
            "metrics": self.last_row,
            "watch": self.watch.state(),
            "recipe": self.config.model_dump(mode="json"),
            "git": git_revision(),
        }

        buffers = {"under_way": buffer} if buffer is not None else {}
        buffers |= {str(number): waiting for number, waiting in waiting_batches.items()}

        def write(folder: Path) -> list[Path]:
            own = training_state.write_rank(folder, rank, buffers)
            if rank > 0:
                return own
            if self.metrics_file.exists():
                sync_to_disk(self.metrics_file)
            return own + training_state.write_shared(folder, files, state)

        save_checkpoint(
            self.accelerator,
            self.checkpoints,
            step=step,
            write=write,
            keep=training.keep_checkpoints,
            keep_best=training.keep_best,
        )

    def _restore(self, checkpoint: Path) -> dict[int, RolloutBuffer]:
        """Go on from a checkpoint; returns the rollout batches that had been sampled ahead, by their number."""
        state, ranks = read_state(checkpoint), self.accelerator.num_processes
        training_state.restore(checkpoint, state, self.updater.learners, self.updater.followers)
        self.updater.restore(state)
        self.watch.restore(state["watch"])
        if "curriculum" in state:
            self.curriculum.restore(state["curriculum"])
        if self.replay is not None:
            self.replay.restore(load_file(checkpoint / "replay.safetensors"), state["replay"])
        self.first_batch, self.prompts_used, self.last_row = state["batch"], state["prompts_used"], state["metrics"]
        buffers = training_state.restore_rank(
            checkpoint,
            self.accelerator.process_index,
            ranks,
            saved_ranks=state["ranks"],
            minibatches=self.config.training.minibatches_per_batch,
        )
        self.under_way = buffers.pop("under_way", None)
        within = f" and {self.under_way.steps_taken} optimizer steps of the next" if self.under_way is not None else ""
        say(f"resuming after batch {self.first_batch}{within}, policy version {self.policy_version}")
        if state["ranks"] != ranks:
            say(
                f"the checkpoint is of {state['ranks']} ranks and this run has {ranks}: the stream of prompts goes on, each rank takes its new share"
            )
        if state["git"] != git_revision():
            say(f"the checkpoint is of revision {state['git']} and the code is at {git_revision()}")
        return {int(number): buffer for number, buffer in buffers.items()}

    def save(self, tokenizer: Any) -> None:
        """The trained policy and its tokenizer in the run's folder, the critic in a folder below it, and the best policy in another."""
        self.accelerator.wait_for_everyone()
        write = self.accelerator.is_main_process
        save_model(self.unwrapped, self.run.folder, write=write)
        if self.updater.critic is not None:
            save_model(self.updater.critic.unwrapped.model, self.run.folder / "critic", write=write)
        if write:
            tokenizer.save_pretrained(self.run.folder)
        if self.config.training.keep_best is not None:
            self._save_best(self.config.training.keep_best, tokenizer)

    def _save_best(self, key: str, tokenizer: Any) -> None:
        """The policy of the checkpoint with the highest value of a metric; the trained one when the last batch's is as high."""
        best = best_whole(self.accelerator, self.checkpoints, key)
        row = read_state(best)["metrics"] if best is not None else self.last_row
        if best is None or row[key] <= self.last_row.get(key, -math.inf):
            row = self.last_row
        else:
            training_state.restore(best, read_state(best), self.updater.learners, self.updater.followers)
        say(f"best: {key} {row.get(key, math.nan):.4g} in batch {row['batch']:.0f} of those with a checkpoint")
        save_model(self.unwrapped, self.run.folder / "best", write=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            tokenizer.save_pretrained(self.run.folder / "best")

    def summary(self) -> dict[str, Any]:
        """What the whole run, resumed or not, comes to."""
        rows = read_jsonl(self.metrics_file)
        measured = [row["policy/kl_sampler"] for row in rows if "policy/kl_sampler" in row]
        return {
            "rollout_engine": self.engine.name,
            "max_kl_sampler": max(measured, default=None),
            "policy_version": self.policy_version,
        }

    # -------------------------------------------------------------------------------------------------------- rollouts and scores

    def collect(self, batch: int, metrics: Metrics, seconds: dict[str, float]) -> tuple[list[Rollout], list[Score]]:
        """This rank's share of a rollout batch with its scores; groups without signal are replaced `refill_rounds` times.

        Raises:
            RuntimeError: when too many completions could not be judged, those of replaced groups included.
        """
        rollout = self.config.rollout
        rollouts, scores = self._sample_and_score(self._take(self._share, batch), batch, 0, metrics, seconds)
        size = rollout.samples_per_prompt
        for attempt in range(1, rollout.refill_rounds + 1):
            idle = [g for g in range(0, len(scores), size) if not has_signal(scores[g : g + size])]
            chosen = self._take(len(idle), batch)
            if not sum(self._gather_sampling([len(idle)])):
                break
            fresh, judged = self._sample_and_score(chosen, batch, attempt, metrics, seconds)
            for g, start in enumerate(idle):
                new = slice(g * size, (g + 1) * size)
                if has_signal(judged[new]):
                    rollouts[start : start + size], scores[start : start + size] = fresh[new], judged[new]
                    metrics.add("rollout/refilled", total=1, count=0)
        metrics.add("rollout/refilled", total=0, count=len(scores) // size)
        metrics.add("rollout/tokens", total=0, count=1)
        self.curriculum.describe(metrics, batch=batch)
        if rollout.temperature_schedule is not None:
            metrics.add("rollout/temperature", total=rollout.temperature_at(batch), count=1)
        share = reduce_metrics(self._gather_sampling([metrics.pairs()]))["rollout/undecided"]
        require_judged(share, self.config.guards.max_undecided_share, scores)
        return rollouts, scores

    @property
    def _share(self) -> int:
        """Prompts of a rollout batch that are this rank's."""
        return self.config.rollout.prompts_per_batch // self.accelerator.num_processes

    def _gather_sampling(self, items: list[Any]) -> list[Any]:
        """All ranks' items, where rollouts are sampled, which may be a thread beside the training."""
        return gather(self.accelerator, items, self._sampling_group)

    def _take(self, count: int, batch: int) -> list[Choice]:
        """This rank's next problems, of those that all ranks take."""
        wanted = self._gather_sampling([count])
        first, start = sum(wanted[: self.accelerator.process_index]), self.prompts_used
        self.prompts_used += sum(wanted)
        return self.curriculum.choose(start, sum(wanted), batch=batch)[first : first + count]

    def _sample_and_score(
        self, chosen: Sequence[Choice], batch: int, attempt: int, metrics: Metrics, seconds: dict[str, float]
    ) -> tuple[list[Rollout], list[Score]]:
        prompts, size = [self.prompts[c.problem] for c in chosen], self.config.rollout.samples_per_prompt
        rollouts: list[Rollout] = []
        if prompts:
            started = time.perf_counter()
            with _timed(seconds, "rollout"):
                rollouts = self.sample(prompts, batch, attempt)
            tokens = sum(len(r.token_ids) for r in rollouts)
            metrics.add("rollout/tokens_per_second", total=tokens, count=time.perf_counter() - started)
            metrics.add("rollout/tokens", total=tokens, count=0)
            rollouts = [replace(r, weight=chosen[i // size].weight) for i, r in enumerate(rollouts)]
        with _timed(
            seconds, "reward"
        ):  # without rollouts too: other ranks may need this one in a reward model that is sharded
            scores = self._reward_of(batch)(rollouts)
        describe(rollouts, scores, metrics, group_size=size)
        if self.curriculum.measures:
            found = outcomes([c.problem for c in chosen], scores)
            self.curriculum.observe(self._gather_sampling(found), batch=batch)
        return rollouts, scores

    def _reward_of(self, batch: int) -> RewardFn:
        """The reward function as it is for a rollout batch, whose number here is from 0."""
        return self.reward_fn.at(batch + 1) if isinstance(self.reward_fn, ScheduledReward) else self.reward_fn

    def sample(self, prompts: Sequence[Prompt], batch: int, attempt: int = 0) -> list[Rollout]:
        """Completions of prompts by the policy that the engine holds."""
        seed = hash((self.config.seed, batch, self.accelerator.process_index, attempt)) & 0x7FFFFFFF
        sampling = replace(Sampling.of(self.config.rollout), temperature=self.config.rollout.temperature_at(batch))
        rollouts = self.engine.generate(prompts, sampling, seed=seed)
        require_fresh(rollouts, self.policy_version, max_age=self._max_age)
        return rollouts

    def judge(
        self, rollouts: Sequence[Rollout], scores: Sequence[Score], metrics: Metrics, batch: int = 0
    ) -> Experience:
        """Advantages from scores, and from the reference and the critic where the recipe has them."""
        kl = values = None
        if self.updater.reference is not None and self.config.algorithm.kl_in == "reward":
            kl = self.updater.kl_to_reference(rollouts, batch=batch)
            metrics.add("policy/kl_reference", total=sum(k.sum().item() for k in kl), count=sum(len(k) for k in kl))
        if self.updater.critic is not None:
            values = self.updater.values(rollouts)
        ranks = Ranks(lambda items: gather(self.accelerator, items), self.accelerator.process_index)
        coefficient = self.updater.kl_coefficient
        experience = estimate(
            rollouts, scores, self.config, ranks=ranks, kl=kl, kl_coefficient=coefficient, values=values
        )
        describe_advantages(experience, metrics, self.config)
        if kl is not None:
            count = len(rollouts) * self.accelerator.num_processes
            self.updater.adapt_kl(self._means(metrics)["policy/kl_reference"], num_completions=count)
        return experience

    def _means(self, metrics: Metrics) -> dict[str, float]:
        return reduce_metrics(gather(self.accelerator, [metrics.pairs()]))


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - started


def _describe_costs(experience: Experience, seconds: dict[str, float], metrics: Metrics) -> None:
    total = sum(seconds.values())
    for part in PARTS:
        metrics.add(f"seconds/{part}", total=seconds[part], count=1)
        metrics.add(f"share/{part}", total=seconds[part], count=total)
    tokens = sum(len(r.token_ids) for r, t in zip(experience.rollouts, experience.trained, strict=True) if t)
    metrics.add("train/tokens_per_second", total=tokens, count=seconds["train"])
    on_device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_memory_gb()
    metrics.add("memory/peak_gb", total=on_device, count=1)
