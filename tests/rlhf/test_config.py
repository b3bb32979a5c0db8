import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.config import GRPO, batch_arithmetic, load_config, parse_config, to_yaml

ROOT = Path(__file__).parents[2]
GRPO_RECIPE = ROOT / "recipes/tiny/grpo.yaml"


def grpo(*overrides):
    return load_config(GRPO_RECIPE, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=0.5", "unknown key 'rollout.temprature'; did you mean 'temperature'?"),
        ("learning_rate=1e-3", "unknown key 'learning_rate'; known: "),
        ("optimizer.learning_rte=1", "did you mean 'learning_rate'?"),
        (
            "optimizer.learning_rate=fast",
            "key 'optimizer.learning_rate' has the value 'fast'; input should be a valid number",
        ),
        ("optimizer.learning_rate=-1", "input should be greater than 0"),
        ("rollout.top_p=0.9", "unknown key 'rollout.top_p'"),
        (
            "algorithm.kl_coefficient=0.1",
            "reference is not set; name the weights under reference.path or set algorithm.kl_coefficient to 0",
        ),
        ("reference.path=x", "algorithm.kl_coefficient is 0, so nothing would read it"),
        ("rollout.samples_per_prompt=1", "set it to 2 or more"),
        ("training.minibatches_per_batch=5", "not a multiple of training.minibatches_per_batch 5"),
        ("training.tokens_per_micro_batch=100", "less than one sequence"),
        ("rewards=[{name: format}]", "rewards has no correctness component"),
        ("rewards=[{name: correctness}, {name: correctness}]", "the same component twice"),
        ("rewards=[{name: reward_model}]", "path"),
        ("policy.router_replay=true", "rollout.record_experts is not, so there would be nothing to replay; set it"),
        ("rollout.engine=server", "there is no rollout.server; give both (server: {} starts one here) or neither"),
        ("rollout.server={}", "rollout.engine is auto and rollout.server is set, which nothing would read"),
        ("rollout={engine: server, server: {replicas: 2, devices: ['0']}}", "devices names 1 sets and replicas is 2"),
        ("rollout={engine: server, server: {urls: ['http://h:1'], devices: ['0']}}", "urls names others"),
        ("rollout={engine: server, server: {urls: ['h:1']}}", "should match pattern"),
        (
            "rollout={engine: server, server: {update_in_flight: true}}",
            "no completion is ever in flight; raise it to 1",
        ),
        ("training.max_staleness=1", "rollout.engine is auto, which samples in the process that trains"),
        ("rollout.engine=sglang", "input should be 'auto', 'vllm', 'transformers' or 'server'"),
    ],
)
def test_a_wrong_key_or_value_is_a_sentence_with_its_repair(override, message):
    with pytest.raises(ValueError) as error:
        grpo(override)
    assert message in str(error.value)


def test_rollouts_of_an_older_policy_must_be_corrected_for():
    servers = ("rollout.engine=server", "rollout.server={}", "training.max_staleness=1")
    with pytest.raises(ValueError, match="sampler_correction is none: rollouts of an older policy"):
        grpo(*servers)
    judge = "rewards=[{name: correctness}, {name: reward_model, path: x, placement: sharded}]"
    with pytest.raises(ValueError, match="its ranks score together, which would collide with training"):
        grpo(*servers, "algorithm.sampler_correction=truncate", judge)
    config = grpo(*servers, "algorithm.sampler_correction=truncate")
    assert dict(batch_arithmetic(config, 1))["data is"] == (
        "off policy by up to 1 steps, corrected by the clipped ratio; sampled while the batch before is trained on, 2 steps older, corrected by "
        "algorithm.sampler_correction"
    )


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("tiny", "num_experts=4", "intermediate_size is 384, of a plain model, and num_experts of a mixture are set"),
        ("tiny", "intermediate_size=0", "set the latter for a plain model, the others for a mixture"),
        ("moe", "expert_intermediate_size=0", "expert_intermediate_size and intermediate_size are not set"),
        ("moe", "experts_per_token=9", "experts_per_token is 9, more than num_experts 8"),
    ],
)
def test_an_architecture_is_a_plain_model_or_a_whole_mixture(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(ROOT / f"recipes/{recipe}/build_model.yaml", [f"architecture.{override}"])


def test_small_numbers_in_scientific_notation_are_numbers():
    assert grpo("optimizer.learning_rate=1e-6").optimizer.learning_rate == 1e-6


def test_off_is_a_word_and_a_truth_value_where_one_is_wanted():
    assert grpo("watch.action=off").watch.action == "off"
    assert grpo("algorithm.scale_by_std=off").algorithm.scale_by_std is False
    assert grpo("algorithm.scale_by_std=False").algorithm.scale_by_std is False


def test_a_key_that_stands_twice_in_a_recipe_is_an_error(tmp_path):
    (tmp_path / "twice.yaml").write_text(GRPO_RECIPE.read_text() + "training:\n  num_batches: 3\n")
    with pytest.raises(ValueError, match="'training' stands twice"):
        load_config(tmp_path / "twice.yaml")


def test_an_override_wins_over_the_recipe_and_the_recipe_over_what_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text(GRPO_RECIPE.read_text())
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nrollout:\n  samples_per_prompt: 4\nseed: 3\n")
    config = load_config(tmp_path / "child.yaml", ["seed=5"])
    assert isinstance(config, GRPO)
    assert (config.rollout.samples_per_prompt, config.seed) == (4, 5)
    assert config.rollout.max_new_tokens == grpo().rollout.max_new_tokens


def test_a_recipe_that_extends_itself_says_so(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match=r"extends itself through a.yaml -> b.yaml"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_recipe_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"did you mean '.*recipes/tiny/grpo.yaml'"):
        load_config(ROOT / "recipes/tiny/gpro.yaml")


def test_the_printed_recipe_loads_to_the_same_config():
    config = grpo()
    assert parse_config(yaml.safe_load(to_yaml(config)), "printed") == config


def test_printing_a_recipe_takes_under_a_second_and_no_torch():
    code = """if True:
        import sys, time
        from rlhf.config.__main__ import main
        main(sys.argv[1:])
        assert 'torch' not in sys.modules
        print("processor seconds", time.process_time())"""  # what others do on the same cores does not count
    done = subprocess.run(
        [sys.executable, "-c", code, str(GRPO_RECIPE), "seed=7"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 1.0
    assert "seed: 7" in done.stdout


def test_batch_arithmetic_of_a_run_on_two_ranks():
    rows = dict(
        batch_arithmetic(
            grpo(
                "rollout.prompts_per_batch=16",
                "rollout.samples_per_prompt=8",
                "training.num_batches=10",
                "training.passes_per_batch=3",
            ),
            2,
        )
    )
    assert rows["completions per rollout batch"] == "128 = 16 prompts x 8 samples"
    assert rows["completions per optimizer step"] == "64 (32 per rank)"
    assert rows["optimizer steps"] == "60 = 10 batches x 2 mini-batches x 3 passes"
    assert "off policy by up to 5 steps" in rows["data is"]
    assert dict(batch_arithmetic(grpo("training.minibatches_per_batch=1"), 1))["data is"] == "on policy"


def test_batch_arithmetic_that_does_not_divide_names_the_keys():
    with pytest.raises(ValueError, match="not a multiple of ranks x training.minibatches_per_batch = 3 x 2"):
        batch_arithmetic(grpo(), 3)
    with pytest.raises(ValueError, match=r"training\.micro_batch_size x ranks = 32 x 3"):
        batch_arithmetic(load_config(ROOT / "recipes/tiny/sft.yaml"), 3)
