"""The stages of MobileVLM: two on the pages of Chinese apps, then fine-tuning, from Qwen-VL-Chat.

Sources: XiaoMi/mobilevlm, the training scripts; MobileVLM, arXiv:2409.14818, of which a summary was read.
"""

from __future__ import annotations

from vlkit.training.presets.fact import Fact, Stage

CODE, PAPER = "XiaoMi/mobilevlm, the training scripts", "MobileVLM, arXiv:2409.14818"


def _stage(name: str, title: str, data: str, *, batch: tuple[int, int, int], tower: bool) -> Stage:
    each, accumulated, devices = batch
    return Stage(
        f"mobilevlm/{name}",
        title,
        about={
            "data": Fact(data, PAPER, "summary"),
            "base": Fact("Qwen-VL-Chat", CODE),
            "precision": Fact("bf16", CODE),
            "memory": Fact("ZeRO-3", CODE),
        },
        sets={
            "objective.kind": Fact("next-token", CODE),
            "train": Fact(
                ("vision", "projector", "llm") if tower else ("projector", "llm"),
                CODE,
                note="fix_vit False" if tower else "fix_vit True: the tower rests, its resampler learns",
            ),
            "epochs": Fact(1.0, CODE),
            "batch": Fact(
                each * accumulated * devices,
                CODE,
                note=f"{each} samples x {accumulated} micro-batches x {devices} devices",
            ),
            "data.max_tokens": Fact(4096, CODE),
            "data.labels": Fact(
                {"on": "answers", "special": "everywhere"},
                f"{CODE}; Qwen-VL, its fine-tuning script",
                note="answers, and turn marks and newlines wherever they stand",
            ),
            "optimizer.kind": Fact("adamw", CODE, note="Adam"),
            "optimizer.lr": Fact(1e-5, CODE),
            "optimizer.weight_decay": Fact(0.1, CODE),
            "optimizer.betas": Fact((0.9, 0.95), CODE, note="the second; the first is transformers' default"),
            "schedule.warmup": Fact(0.01, CODE, note="of the steps"),
            "schedule.shape": Fact("cosine", CODE),
            "schedule.final": Fact(0.0, CODE, note="where transformers' cosine ends"),
        },
    )


STAGES = (
    _stage(
        "stage-1",
        "Inside a page: element list, element grounding, action space",
        "single pages of Mobile3M: 49 apps, 3,098,786 screenshots of 720 x 1280 pixels",
        batch=(4, 16, 8),
        tower=True,
    ),
    _stage(
        "stage-2",
        "Between pages: the action that leads from one to the next",
        "pairs of pages of Mobile3M, 20,138,332 actions",
        batch=(2, 16, 7),
        tower=True,
    ),
    _stage(
        "sft",
        "Fine-tuning: page navigation, questions, Auto-UI",
        "page navigation, questions about screens, Auto-UI",
        batch=(4, 16, 6),
        tower=False,
    ),
)
