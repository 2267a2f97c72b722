"""Preparing images, videos and conversations: vlkit's processors against those of transformers.

    python benchmarks/processor.py [WHAT ...] [--repeats 7] [--threads 1]

    images         pictures of mixed sizes in memory, by the rule of Qwen2-VL, each resampled by torch
    pillow         the same, resampled by Pillow
    files          the same from JPEG files, decoding included
    large          one picture of 12 megapixels
    video          16 frames of 1280x720 pixels, by the rule of Qwen3-VL
    conversations  chats of text and pictures with the vocabulary of Qwen3 (python -m tests.assets all)

Both get the same pictures, made of waves and noise; what both make of them is compared before the clock runs. Beside them
runs what cannot be saved: the resampling alone, and a first touch of memory for the patches.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import compare, machine, print_table

from tests.parity.test_processors import QWEN2, QWEN3, image_processor, picture, theirs, video_processor
from vlkit.packing import Packed
from vlkit.processing import Processor, load_tokenizer, pack_images, pack_video

# Height and width in pixels: photographs, screens, pages, thumbnails, as they meet in a data set for chats.
SIZES = [
    *((480, 640), (427, 640), (640, 480), (768, 1024), (1080, 1920), (1170, 540), (1654, 1170), (336, 336)),
    *((720, 1280), (224, 224), (600, 800), (150, 900)),
]

Functions = dict[str, Callable[[], object]]


def check(ours: Packed, expected: torch.Tensor) -> None:
    """One grey level and a little more is what two resamplers may differ by."""
    difference = (theirs(ours) - expected).abs()
    assert difference.max() < 0.07, f"they differ by {difference.max():.3g}"
    assert difference.mean() < 0.01, f"they differ by {difference.mean():.3g} on average"


def floor(images: list[Image.Image]) -> Callable[[], object]:
    """Resampling, and memory for the patches."""
    planes = [torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0) for image in images]
    plans = [QWEN2.image.target_size(image.height, image.width) for image in images]

    def run() -> None:
        for plane, plan in zip(planes, plans, strict=True):
            if plan.resized != tuple(plane.shape[2:]):
                F.interpolate(plane, plan.resized, mode="bicubic", antialias=True)
        np.empty((sum(plan.grid[0] * plan.grid[1] for plan in plans), QWEN2.image.patch_dim), np.float32).fill(0)

    return run


def of_images(images: list[Image.Image], resampler: str, backend: str) -> Functions:
    rule = QWEN2.image.replace(resampler=resampler)
    processor = image_processor(QWEN2, backend)
    check(pack_images(images, rule), processor(images, return_tensors="pt")["pixel_values"])
    return {
        "vlkit": lambda: pack_images(images, rule),
        "transformers": lambda: processor(images, return_tensors="pt"),
        "resampling and memory alone": floor(images),
    }


def of_files(images: list[Image.Image]) -> Functions:
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    processor = image_processor(QWEN2, "torchvision")

    def reference() -> object:
        return processor([Image.open(io.BytesIO(file)).convert("RGB") for file in files], return_tensors="pt")

    check(pack_images(files, QWEN2.image), reference()["pixel_values"])  # type: ignore[index]
    return {
        "vlkit": lambda: pack_images(files, QWEN2.image),
        "transformers": reference,
        "decoding alone": lambda: [Image.open(io.BytesIO(file)).load() for file in files],
    }


def of_video() -> Functions:
    from transformers.video_utils import VideoMetadata

    frames = [picture(720, 1280, seed) for seed in range(16)]
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).contiguous()
    processor = video_processor(QWEN3)
    metadata = VideoMetadata(total_num_frames=16, fps=2)

    def reference() -> Any:
        return processor(stacked, video_metadata=metadata, return_tensors="pt")

    check(pack_video(stacked, QWEN3.image, QWEN3.video, fps=2).patches, reference()["pixel_values_videos"])
    return {
        "vlkit": lambda: pack_video(stacked, QWEN3.image, QWEN3.video, fps=2),
        "vlkit, frames as images": lambda: pack_video(frames, QWEN3.image, QWEN3.video, fps=2),
        "transformers": reference,
    }


def of_conversations() -> Functions:
    from transformers import AutoTokenizer, Qwen2VLProcessor

    from tests.assets import asset

    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(asset(f"qwen3-{name}"), Path(folder) / name)
        tokenizer, own = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    processor = Processor(QWEN2, own)
    reference = Qwen2VLProcessor(
        image_processor(QWEN2, "torchvision"), tokenizer, video_processor(QWEN2), chat_template=""
    )
    said = "What do the two pictures have in common? Answer in one sentence, and say how sure you are. " * 8
    pictures = [picture(336, 448, seed) for seed in range(8)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": said}]}]
        for image in pictures
    ]
    texts = [
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|><|image_pad|><|vision_end|>{said}<|im_end|>\n<|im_start|>assistant\n"
        )
    ] * len(chats)

    def theirs_() -> Any:
        return reference(text=texts, images=pictures, padding=True, return_tensors="pt")

    assert torch.equal(processor(chats).ids.tokens, theirs_()["input_ids"].flatten())
    return {"vlkit": lambda: processor(chats), "transformers": theirs_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    all_: dict[str, tuple[str, int, Callable[[], Functions]]] = {
        "images": (f"{len(SIZES)} pictures, resampled by torch", len(SIZES), lambda: of_images(images, "torch", "torchvision")),
        "pillow": (f"{len(SIZES)} pictures, resampled by Pillow", len(SIZES), lambda: of_images(images, "pillow", "pil")),
        "files": (f"{len(SIZES)} JPEG files", len(SIZES), lambda: of_files(images)),
        "large": ("one picture of 12 megapixels", 1, lambda: of_images([picture(3000, 4000)], "torch", "torchvision")),
        "video": ("16 frames of 1280x720", 16, of_video),
        "conversations": ("8 conversations with a picture", 8, of_conversations),
    }  # fmt: skip
    parser.add_argument("what", nargs="*", choices=[*all_, []], default=[], metavar="WHAT")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    for name in options.what or all_:
        title, count, functions = all_[name]
        timings = compare(functions(), repeats=options.repeats, warmup=1)
        print_table(title, timings, baseline="transformers")
        rates = ", ".join(f"{each} {count / timings.median(each):.1f}/s" for each in ("vlkit", "transformers"))
        print(f"  {rates}", flush=True)


if __name__ == "__main__":
    main()
