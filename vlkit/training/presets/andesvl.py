"""The stages of AndesVL: three of pre-training, fine-tuning, MPO for Instruct and GRPO for Thinking.

Source: AndesVL, arXiv:2510.11496, of which only the abstract was read. All figures here are of summaries, where two of them
agree or one is more detailed; learning rates and sizes of data are in none. Rules of MPO and GRPO are of their own papers.
"""

from __future__ import annotations

from vlkit.training.presets.fact import Fact, Facts, Stage, unknown

PAPER = "AndesVL, arXiv:2510.11496"
INTERNVL = "OpenGVLab/InternVL, the published MPO scripts"
ALL = ("vision", "projector", "llm")
NOT_STATED = unknown("not in what could be read of the report")
SMALL, LARGE = 896 * 896, 1792 * 1792  # pixels: 4,096 and 16,384 patches of 14 pixels a side

_RATES: Facts = {
    "optimizer.kind": NOT_STATED,
    "optimizer.lr": NOT_STATED,
    "optimizer.weight_decay": NOT_STATED,
    "schedule.warmup": NOT_STATED,
    "schedule.shape": NOT_STATED,
    "schedule.final": NOT_STATED,
}
_LENGTH: Facts = {"steps|epochs": NOT_STATED, "batch|packs": NOT_STATED}


def _multitask(variant: str, length: int) -> Stage:
    return Stage(
        f"andesvl/multitask-{variant.lower()}",
        f"Multi-task pre-training, {variant}",
        about={
            "data": Fact("annotated tasks, with grounding and graphical interfaces", PAPER, "summary"),
            "patches of an image": Fact("4,096, then 16,384", PAPER, "summary"),
        },
        sets={
            "objective.kind": Fact("next-token", PAPER, "summary"),
            "train": Fact(ALL, PAPER, "recalled"),
            **_LENGTH,
            "data.pack_tokens": Fact(length, PAPER, "summary", "8,192 for Instruct, 32,768 for Thinking"),
            "data.labels": Fact({"on": "answers"}, PAPER, "summary"),
            "resolution.points": Fact(((0.0, LARGE),), PAPER, "summary", "16,384 patches of 14 pixels a side"),
            **_RATES,
        },
    )


STAGES = (
    Stage(
        "andesvl/alignment",
        "Vision-language alignment",
        about={"data": Fact("captions, OCR and other pairs", PAPER, "summary")},
        sets={
            "objective.kind": Fact("next-token", PAPER, "summary"),
            "train": Fact(("vision", "projector"), PAPER, "recalled", "the language model is kept as it is"),
            **_LENGTH,
            "data.pack_tokens": Fact(2048, PAPER, "summary"),
            "data.labels": NOT_STATED,
            "resolution.points": unknown(
                f"at most 896 x 896 = {SMALL} pixels, then 1792 x 1792 = {LARGE}; where it changes is not stated (summary)"
            ),
            **_RATES,
        },
    ),
    Stage(
        "andesvl/joint",
        "Joint vision-language pre-training",
        about={
            "data": Fact("interleaved images and text, text, questions, pairs of the stage before", PAPER, "summary"),
            "sequence length": Fact("2,048, then 8,192", PAPER, "summary"),
            "rate": Fact("relatively low", PAPER, "summary"),
            "Thinking": Fact("long chains of thought from here on", PAPER, "summary"),
        },
        sets={
            "objective.kind": Fact("next-token", PAPER, "summary"),
            "train": Fact(ALL, PAPER, "summary", "the language model joins in"),
            **_LENGTH,
            "data.pack_tokens": Fact(8192, PAPER, "summary"),
            "data.labels": Fact({"on": "all"}, PAPER, "recalled"),
            "data.images_first": Fact(
                0.5, PAPER, "summary", "all images of an interleaved sample to its front, half the time"
            ),
            "resolution.points": Fact(((0.0, SMALL),), PAPER, "recalled", "4,096 patches of 14 pixels a side"),
            **_RATES,
        },
    ),
    _multitask("Instruct", 8192),
    _multitask("Thinking", 32_768),
    Stage(
        "andesvl/sft",
        "Supervised fine-tuning",
        about={"samples": Fact(16e6, PAPER, "summary", "about")},
        sets={
            "objective.kind": Fact("next-token", PAPER, "summary"),
            "train": NOT_STATED,
            **_LENGTH,
            "data.pack_tokens": NOT_STATED,
            "data.labels": NOT_STATED,
            **_RATES,
        },
    ),
    Stage(
        "andesvl/mpo",
        "Mixed preference optimisation, Instruct",
        about={
            "loss": Fact(
                "0.8 DPO + 0.2 BCO with a shift + 1.0 cross-entropy of the chosen answer",
                f"{INTERNVL}; arXiv:2411.10442",
                note="InternVL's, whose method it is",
            ),
            "InternVL's rate": Fact("5e-6 (InternVL2-8B), 1e-6 (InternVL2.5), 2e-7 (InternVL3)", INTERNVL),
            "data": Fact("MMPR and pairs of their own", PAPER, "summary"),
        },
        sets={
            "objective.kind": Fact("mpo", PAPER, "summary"),
            "objective.beta": unknown("AndesVL's is not known; InternVL's scripts leave 0.1"),
            "objective.weights": unknown("AndesVL's are not known; InternVL's scripts have [0.8, 0.2, 1.0]"),
            "train": NOT_STATED,
            **_LENGTH,
            **_RATES,
        },
    ),
    Stage(
        "andesvl/grpo",
        "Group relative policy optimisation, Thinking",
        about={
            "prompts": Fact("multimodal reasoning, then text alone, each from easy to hard", PAPER, "summary"),
            "original": Fact(
                "clip 0.2, KL weight 0.04", "GRPO, arXiv:2402.03300", "recalled", "of the method, not of AndesVL"
            ),
        },
        sets={
            "objective.kind": Fact("grpo", PAPER, "summary"),
            "objective.verifier": unknown(
                "how answers are compared is yours: 'exact', 'number', 'boxed' or a function"
            ),
            "objective.group": NOT_STATED,
            "objective.max_new_tokens": NOT_STATED,
            "objective.clip": unknown("not known; [0.2, 0.2] in the method's paper"),
            "objective.kl_weight": unknown("not known; 0.04 in the method's paper, often 0 since"),
            "data.draws": Fact("curriculum", PAPER, "summary", "from easy to hard, by the samples' difficulty"),
            "train": NOT_STATED,
            **_LENGTH,
            **_RATES,
        },
    ),
)
