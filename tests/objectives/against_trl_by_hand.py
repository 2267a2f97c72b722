"""DPO, MPO and the GRPO family against the losses of TRL's trainers, called without a trainer around them.

    python -m tests.objectives.against_trl_by_hand          # needs trl 1.16; prints the largest differences, in fp64

TRL's "bco_pair" has no running threshold, so MPO is compared at 0.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlkit.objectives.policy import VARIANTS, answer_weights, group_advantages, policy_loss
from vlkit.objectives.preference import implicit_rewards, mpo_loss
from vlkit.objectives.segments import segment_sum
from vlkit.packing import Layout

NUM, LONGEST, GROUP = 8, 7, 4


def trainer(**fields: Any) -> Any:
    """What the methods of TRL look at of their trainer."""

    def same(value: Any, **_: Any) -> Any:
        return value

    accelerator = SimpleNamespace(
        device="cpu", num_processes=1, gather=same, gather_for_metrics=same, reduce=same, unwrap_model=same
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **fields,
    )


def padded() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the policy, of the old one and of the reference [answers, longest], and the mask of real tokens."""
    generator = torch.Generator().manual_seed(0)
    ours, old, reference = torch.randn(3, NUM, LONGEST, generator=generator, dtype=torch.float64) * 0.3 - 1
    lengths = torch.randint(1, LONGEST + 1, (NUM, 1), generator=generator)
    return ours.requires_grad_(), old, reference, torch.arange(LONGEST) < lengths


def differences(ours: Tensor, theirs: Tensor, of: Tensor) -> str:
    loss = abs(ours.item() - theirs.item())
    grads = [torch.autograd.grad(each, of, retain_graph=True)[0] for each in (ours, theirs)]
    apart = float((grads[0] - grads[1]).abs().max())
    return f"loss {ours.item():.12f} {theirs.item():.12f} differ by {loss:.1e}, gradients by {apart:.1e}"


def preference(types: list[str], weights: list[float]) -> str:
    from trl.trainer.dpo_trainer import DPOTrainer

    ours, _, reference, mask = padded()
    kept = ours * mask
    outputs = SimpleNamespace(
        log_probs=kept, entropy=kept.detach(), mean_logits=kept.detach(), is_top1=mask, log_sum_sq_probs=None
    )
    of_reference = (reference * mask).sum(1).chunk(2)
    fake = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=types,
        loss_weights=weights,
        beta=0.1,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = torch.cat([torch.zeros(NUM, 1, dtype=torch.bool), mask], dim=1)
    ids = torch.ones(NUM, LONGEST + 1, dtype=torch.long)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": whole,
        **dict(zip(names, of_reference, strict=True)),
    }
    theirs = DPOTrainer._compute_loss(fake, lambda **_: outputs, inputs, False)

    layout = Layout(tuple(mask.sum(1).tolist()))
    sums, frozen_sums = segment_sum(ours[mask], layout), segment_sum(reference[mask], layout)
    chosen, rejected = sums.chunk(2)
    rewards = implicit_rewards(chosen, rejected, *frozen_sums.chunk(2), beta=0.1)
    found = mpo_loss(
        rewards,
        chosen,
        shift=0.0,
        num_pairs=NUM // 2,
        num_tokens=float(mask[: NUM // 2].sum()),
        weights=[*weights, 0.0, 0.0][:3],
    )
    return differences(found.total, theirs, ours)


def policy(variant: str) -> str:
    from trl.trainer.grpo_trainer import GRPOTrainer

    ours, old, reference, mask = padded()
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    grouped = rewards.view(-1, GROUP)
    centred = grouped - grouped.mean(1, keepdim=True)
    of_theirs = centred if variant == "dr-grpo" else centred / (grouped.std(1, keepdim=True) + 1e-4)
    rule = VARIANTS[variant]
    fake = trainer(
        loss_type=variant.replace("-", "_"),
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        beta=0.04,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        epsilon_low=rule.clip[0],
        epsilon_high=rule.clip[1],
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (ours, torch.zeros_like(ours), None),
    )
    ids = torch.ones(NUM, LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": of_theirs.flatten(),
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    theirs = GRPOTrainer._compute_loss(fake, None, inputs)

    layout = Layout(tuple(mask.sum(1).tolist()))
    advantages = group_advantages(rewards, torch.arange(NUM) // GROUP, rule.scale).double()
    terms = policy_loss(
        ours[mask],
        old[mask],
        advantages[layout.item_ids().long()],
        clip=rule.clip,
        reference=reference[mask],
        kl_weight=0.04,
    )
    weights = answer_weights(
        torch.ones(layout.num_tokens, dtype=torch.bool),
        layout,
        rule.aggregate,
        num_answers=NUM,
        num_tokens=layout.num_tokens,
        max_tokens=LONGEST,
    )
    told = differences((terms.loss * weights).sum(), theirs, ours)
    clipped = abs(float(terms.clipped.double().mean()) - fake._metrics["train"]["clip_ratio/region_mean"][0])
    return f"{told}, clip fraction by {clipped:.1e}"


if __name__ == "__main__":
    lines = {
        "dpo": preference(["sigmoid"], [1.0]),
        "mpo": preference(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        **{name: policy(name) for name in VARIANTS},
    }
    for name, line in lines.items():
        print(f"{name:8} {line}")
