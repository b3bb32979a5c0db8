"""What a model's config.json says of its training: mixture blocks under ZeRO-3, and the size of a checkpoint."""

from __future__ import annotations

from checks.findings import Context, Report, model_source
from rlhf.config import PPO, SFT, Config, Offline, Online, PreferenceTraining, ProcessRewardModel, RewardModel
from rlhf.footprint import Sharding, Trained, optimizer, trained_of, weights
from rlhf.models import qwen3_config
from rlhf.shapes import ModelShape, find_config, read_shape, shape_of


def trained_models(report: Report, config: Config, context: Context) -> dict[str, Trained]:
    """Role to each model that a stage trains and whose shape is known, from its folder or from the stage that will build it."""
    if isinstance(config, Offline):
        speaks = isinstance(config, SFT | PreferenceTraining) or (
            isinstance(config, ProcessRewardModel | RewardModel) and config.head != "classification"
        )
        models = {"model": (config.model, speaks)}
    elif isinstance(config, Online):
        models = {"policy": (config.policy, True)} | (
            {"critic": (config.critic, False)} if isinstance(config, PPO) else {}
        )
    else:
        return {}
    found = {}
    for role, (model, has_head) in models.items():
        shape = _shape(report, role, model.path, context)
        if shape is not None:
            found[role] = trained_of(model, shape, Sharding(), has_head=has_head)
    return found


def _shape(report: Report, role: str, path: str, context: Context) -> ModelShape | None:
    file = find_config(path)
    if file is None and (source := model_source(context, path)) is not None:
        return shape_of(qwen3_config(source.architecture, vocab_size=source.vocab_size).to_dict())
    if file is None:
        return None
    try:
        return read_shape(file)
    except ValueError as error:
        report.add("error", f"{role}: config.json", str(error))
        return None


def checkpoint_sizes(trained: dict[str, Trained]) -> dict[str, tuple[int, int]]:
    """Role to (bytes of weights, bytes of optimizer) in a checkpoint: all ranks' shards together are the whole."""
    whole = Sharding()
    return {role: (int(weights(model, whole, 1)), int(optimizer(model, whole, 1))) for role, model in trained.items()}


def check_routers(report: Report, config: Config, trained: dict[str, Trained]) -> None:
    """Keys that are about the routers of a mixture, of a model that has none."""
    if isinstance(config, SFT):
        role, asked = "model", {"model.router_aux_coefficient": config.model.router_aux_coefficient}
    elif isinstance(config, Online):
        role, asked = "policy", {
            "policy.router_aux_coefficient": config.policy.router_aux_coefficient,
            "policy.router_replay": config.policy.router_replay,
            "rollout.record_experts": config.rollout.record_experts,
        }  # fmt: skip
    else:
        return
    keys = ", ".join(key for key, value in asked.items() if value)
    if keys and role in trained and not trained[role].shape.num_moe_layers:
        report.add(
            "error", "routers", f"{keys} is set and a {trained[role].shape.model_type} model has no router; remove it"
        )


def check_leaves(report: Report, trained: dict[str, Trained]) -> None:
    """The mixture blocks that were found from the model: ZeRO-3's leaf modules."""
    classes = sorted({name for model in trained.values() for name in model.shape.moe_classes})
    if not classes:
        return
    model = next(m.shape for m in trained.values() if m.shape.moe_classes)
    text = f"{', '.join(classes)} route {model.experts_per_token} of {model.num_experts} experts in {model.num_moe_layers} layers"
    report.add("ok", "mixture blocks", f"{text}; under ZeRO-3 each is gathered whole")
