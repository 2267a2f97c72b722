"""Pieces of a conversation -> ids and labels.

pieces --fill_slots--> Text, Placeholders, ... --encode_pieces--> ids, labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlkit.errors import PlaceholderMismatchError
from vlkit.processing.chat import IGNORED, FilledPiece, ImageSlot, Label, Piece, Placeholders, Seen, Text
from vlkit.processing.chat_format import ChatFormat
from vlkit.processing.tokenizer import Tokenizer


def fill_slots(
    pieces: Sequence[Piece], format: ChatFormat, special: Mapping[str, int], seen: Sequence[Seen]
) -> list[FilledPiece]:
    """The pieces with the placeholders of every image and video in their slots, and the times of a video's steps.

    Args:
        special: Ids of special tokens.
        seen: What became of each image and video, in order.

    Raises:
        PlaceholderMismatchError: Another number of slots than of images and videos.
    """
    slots = [piece for piece in pieces if not isinstance(piece, Text)]
    if len(slots) != len(seen):
        kinds = "image placeholders" if all(isinstance(slot, ImageSlot) for slot in slots) else "placeholders"
        given = "images" if kinds == "image placeholders" else "images and videos"
        raise PlaceholderMismatchError(f"the text has {len(slots)} {kinds}, {len(seen)} {given} were given")
    filled: list[FilledPiece] = []
    message = None
    for piece in pieces:
        if isinstance(piece, Text):
            filled.append(piece)
            message = piece.message
        elif isinstance(piece, ImageSlot):
            filled.append(Placeholders(special[format.image_token], sum(seen[piece.visual].tokens)))
        elif not format.frames_apart:
            filled.append(Placeholders(special[str(format.video_token)], sum(seen[piece.visual].tokens)))
        else:
            for count, time in zip(*seen[piece.visual], strict=True):
                prefix = format.frame_prefix.replace("{seconds}", f"{time:.1f}")
                filled.append(Text(prefix, special=True, message=message))
                filled.append(Placeholders(special[str(format.video_token)], count))
                filled.append(Text(format.frame_suffix, special=True, message=message))
    return filled


def encode_pieces(pieces: Sequence[FilledPiece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids, and labels aligned with them: the id where it is learned, -100 elsewhere.

    Texts are joined before they are tokenised, as if all had been one text: a line break that ends a prefix and one
    that starts a question share a token, as on the Hub. Only where an answer begins they do not, as in generation. A token
    of two texts is learned where both are.
    """
    ids: list[int] = []
    labels: list[int] = []
    run: list[tuple[str, Label]] = []
    in_answer = False

    def flush() -> None:
        new = tokenizer.encode("".join(text for text, _ in run)) if run else []
        ids.extend(new)
        labels.extend(
            id if label is True or (label == "control" and _breaks_line(id, tokenizer)) else IGNORED
            for id, label in zip(new, _labels_of_tokens(run, new, tokenizer), strict=True)
        )
        run.clear()

    for piece in pieces:
        answer = isinstance(piece, Text) and piece.learn
        if answer != in_answer:
            flush()
            in_answer = answer
        if isinstance(piece, Placeholders):
            flush()
            ids.extend([piece.id] * piece.number)
            labels.extend([IGNORED] * piece.number)
            continue
        label = piece.learn if piece.label is None else piece.label
        for part in tokenizer.split(piece.text, piece.special):
            if isinstance(part, str):
                run.append((part, label))
                continue
            flush()
            ids.append(part)
            labels.append(part if label else IGNORED)
    flush()
    return ids, [IGNORED, *labels[1:]] if ids else []


def _labels_of_tokens(run: Sequence[tuple[str, Label]], ids: Sequence[int], tokenizer: Tokenizer) -> list[Label]:
    """The label of every token of texts that were tokenised together; False for a token of two texts that differ.

    A token lies before a boundary if the tokens up to it are the same without what follows, and behind one likewise.
    """
    labels: list[Label] = [False] * len(ids)
    texts, start = [text for text, _ in run], 0
    for index, (_, label) in enumerate(run):
        alike = index + 1 < len(run) and run[index + 1][1] == label
        if alike:
            continue
        whole = index + 1 == len(run)
        end = len(ids) if whole else _same_start(tokenizer.encode("".join(texts[: index + 1])), ids)
        labels[start:end] = [label] * max(end - start, 0)
        if not whole:
            behind = tokenizer.encode("".join(texts[index + 1 :]))
            start = max(len(ids) - _same_start(behind[::-1], ids[::-1]), end)
    return labels


def _same_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Ids that two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _breaks_line(id: int, tokenizer: Tokenizer) -> bool:
    text = tokenizer.decode([id])
    return bool(text) and not text.strip("\r\n")
