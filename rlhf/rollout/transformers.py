"""transformers' own generate: the reference engine, and the fallback where vLLM does not install."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf.config import Lora
from rlhf.config import Rollout as RolloutConfig
from rlhf.logprobs import token_logprobs
from rlhf.lora import add_lora, load_adapter
from rlhf.models import load_causal_lm
from rlhf.rollout.engine import Decode, Sampling
from rlhf.types import Prompt, Rollout

MAX_SEQUENCES = 256
"""Generated together; bounds the memory of the key-value cache."""


class TransformersEngine:
    name = "transformers"
    checkpoint_names = False

    def __init__(
        self,
        config: RolloutConfig,
        path: str,
        *,
        revision: str | None,
        stop_token_id: int,
        decode: Decode,
        lora: Lora | None = None,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = load_causal_lm(path, revision=revision, dtype=config.dtype)
        self.lora = lora
        if lora is not None:
            with torch.random.fork_rng():  # the draw is overwritten by the first push; B = 0 hides it until then
                add_lora(self._model, lora)
        self._model.to(device).eval()
        self._stop_token_id, self._decode = stop_token_id, decode
        self.policy_version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        repeated = [prompt for prompt in prompts for _ in range(sampling.samples_per_prompt)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [
                rollout
                for start in range(0, len(repeated), MAX_SEQUENCES)
                for rollout in self._generate(repeated[start : start + MAX_SEQUENCES], sampling)
            ]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        temperature = sampling.temperature or 1.0
        width = max(len(prompt.token_ids) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self._stop_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            attention_mask[row, width - len(prompt.token_ids) :] = 1
        generation = GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=temperature,
            top_k=0,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._stop_token_id,
            pad_token_id=self._stop_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        device = self._model.device
        output = self._model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=generation,
            synced_gpus=False,  # under ZeRO-3 transformers would wait for ranks that sample nothing; these weights are whole
        )
        sampled = output.sequences[:, width:]
        logprobs = torch.stack(
            [token_logprobs(logits, sampled[:, t], temperature=temperature) for t, logits in enumerate(output.logits)],
            1,
        )
        rollouts = []
        for prompt, tokens, token_logps in zip(prompts, sampled.tolist(), logprobs.tolist(), strict=True):
            stopped = self._stop_token_id in tokens
            length = tokens.index(self._stop_token_id) + 1 if stopped else len(tokens)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    token_ids=tuple(tokens[:length]),
                    logprobs=tuple(token_logps[:length]),
                    finish_reason="stop" if stopped else "length",
                    text=self._decode(tokens[:length]),
                    policy_version=self.policy_version,
                )
            )
        return rollouts

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[list[float]]:
        tokens = torch.tensor([[*prompt_ids, *completion_ids]], device=self._model.device)
        logits = self._model(input_ids=tokens[:, :-1]).logits[0, len(prompt_ids) - 1 :]
        return [token_logprobs(logits, tokens[0, len(prompt_ids) :], temperature=1.0).tolist()]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                own[name].copy_(tensor)
        self.policy_version = policy_version

    def load_adapter(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        with torch.no_grad():
            load_adapter(self._model, named_tensors)
        self.policy_version = policy_version

    def close(self) -> None:
        del self._model
