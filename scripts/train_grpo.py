"""Group-relative policy optimisation and its family. `accelerate launch scripts/train_grpo.py --config recipes/tiny/grpo.yaml`"""

from contextlib import closing

from data.chat import ChatRenderer, render_response
from data.records import Demonstration, Problem, read_records
from reward_models.composite import build_reward, require_columns, require_reachable
from rlhf.card import fingerprint
from rlhf.config import GRPO, PPO, ModelReward, Online, RuleReward, require_whole_weights
from rlhf.critic import load_critic
from rlhf.curriculum import Curriculum
from rlhf.distributed import configured_zero_stage, loaded_whole, start
from rlhf.elastic import load_fisher
from rlhf.lora import adapt
from rlhf.models import check_model_path, load_causal_lm, load_tokenizer
from rlhf.retention import Remembered
from rlhf.rollout.engine import build_engine, require_prompts_fit
from rlhf.run import Run, run_stage, say
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import Rollout
from rlhf.weight_sync import Probe

NUM_PROBES = 4


def train_online(config: Online, run: Run) -> None:
    problems = read_records(Problem, config.problems)
    demonstrations = read_records(Demonstration, config.demonstrations)
    check_model_path(config.policy.path, "policy.path")
    if config.reference is not None and config.reference.path is not None:
        check_model_path(config.reference.path, "reference.path")
    if isinstance(config, PPO):
        check_model_path(config.critic.path, "critic.path")
    for reward in config.rewards:
        if isinstance(reward, ModelReward):
            check_model_path(reward.path, f"rewards.{reward.name}.path")
    tokenizer = load_tokenizer(config.policy.path, revision=config.policy.revision)
    renderer = ChatRenderer(tokenizer, config.chat.system_prompt, config.chat.think)
    prompts = [renderer.problem_prompt(p) for p in problems]
    require_prompts_fit(prompts, config.rollout)
    require_columns(config, prompts)
    Curriculum(
        config.curriculum, prompts, seed=config.seed
    )  # a column that is missing is found before a model is loaded

    fitting = reference_solutions(config, renderer, demonstrations)
    remembered = remember(config, renderer)

    accelerator = start(config.seed)
    reward_fn = build_reward(config, prefill=renderer.prefill, device=str(accelerator.device), accelerator=accelerator)
    require_reachable(reward_fn, fitting)
    policy = load_causal_lm(config.policy.path, revision=config.policy.revision, dtype=config.policy.dtype)
    adapt(policy, config.policy)
    reference = config.reference
    critic = load_critic(config.critic) if isinstance(config, PPO) else None
    with loaded_whole(accelerator):  # each rank samples by itself
        engine = build_engine(
            config.rollout,
            config.policy.path,
            revision=config.policy.revision,
            stop_token_id=renderer.stop_token_id,
            decode=renderer.decode,
            lora=config.policy.lora,
            run_folder=run.folder,
        )
    with closing(engine):
        trainer = OnlineTrainer(
            config,
            accelerator,
            policy=policy,
            reference=load_causal_lm(reference.path, revision=reference.revision, dtype=reference.dtype)
            if reference is not None and reference.path is not None
            else None,
            critic=critic,
            engine=engine,
            prompts=prompts,
            reward_fn=reward_fn,
            probes=[Probe(s.prompt.token_ids, s.token_ids) for s in fitting[:NUM_PROBES]],
            pad_token_id=renderer.pad_token_id,
            run=run,
            remembered=remembered,
        )
        trainer.train()
        trainer.save(tokenizer)
        run.finish(**trainer.summary())


def remember(config: Online, renderer: ChatRenderer) -> Remembered:
    """What the recipe's controls of forgetting are about, checked before a model is loaded.

    Raises:
        ValueError: when the Fisher information is of other weights, a demonstration or problem file has nothing that fits, or ZeRO-3 would shard
            weights that a penalty needs whole.
    """
    retention, rollout = config.retention, config.rollout
    require_whole_weights(retention, configured_zero_stage())
    fisher, demonstrations, prompts, grade = None, [], [], None
    if retention.elastic is not None:
        fisher = load_fisher(retention.elastic.fisher, weights=fingerprint(config.policy.path))
    if retention.ptx is not None:
        given = [renderer.demonstrated(d) for d in read_records(Demonstration, retention.ptx.demonstrations)]
        demonstrations = [
            d
            for d in given
            if len(d.prompt.token_ids) <= rollout.max_prompt_tokens and len(d.token_ids) <= rollout.max_new_tokens
        ]
        if not demonstrations:
            raise ValueError(
                f"no demonstration of retention.ptx.demonstrations fits into rollout.max_prompt_tokens {rollout.max_prompt_tokens} and "
                f"max_new_tokens {rollout.max_new_tokens}; raise them"
            )
        say(
            f"retention.ptx: {len(demonstrations):,} demonstrations, {len(given) - len(demonstrations)} left out as too long"
        )
    if retention.adaptive is not None:
        problems = read_records(Problem, retention.adaptive.problems)[: retention.adaptive.num_problems]
        prompts = [renderer.prompt(p.id, p.question, p.answer, p.columns) for p in problems]
        require_prompts_fit(prompts, rollout)
        only = RuleReward(name="correctness", kind="correctness")
        grade = build_reward(config.model_copy(update={"rewards": (only,)}), prefill=renderer.prefill, device="cpu")
    return Remembered(fisher=fisher, demonstrations=demonstrations, prompts=prompts, grade=grade)


def reference_solutions(config: Online, renderer: ChatRenderer, demonstrations: list[Demonstration]) -> list[Rollout]:
    """Demonstrations that fit, of the first 64, as if the policy had written them.

    Raises:
        ValueError: when none fits.
    """
    solutions = [_as_rollout(renderer, d) for d in demonstrations[:64] if d.scratchpad]
    fitting = [s for s in solutions if len(s.token_ids) <= config.rollout.max_new_tokens]
    if not fitting:
        raise ValueError(f"no demonstration fits into rollout.max_new_tokens {config.rollout.max_new_tokens}; raise it")
    return fitting


def _as_rollout(renderer: ChatRenderer, d: Demonstration) -> Rollout:
    """A reference solution as if the policy had written it."""
    text = renderer.completion(render_response(d.scratchpad, d.answer))
    token_ids = tuple(renderer.response_ids(text))
    prompt = renderer.prompt(d.id, d.question, d.answer, {"think": d.think} if d.think else None)
    return Rollout(
        prompt=prompt,
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        finish_reason="stop",
        text=text,
        policy_version=0,
    )


if __name__ == "__main__":
    run_stage(GRPO, train_online)
