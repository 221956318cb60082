"""What one preparation of media was asked to do: frozen before anything is converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.media.latent_source import LatentLayout
from data_pipeline.prepare.media.convert import LatentConverter, parse_segments
from data_pipeline.prepare.media.inputs import LINES, Piece
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.readers import RECORD, RejectError, read_piece, tar_members
from data_pipeline.prepare.media.spill import sample_keys
from data_pipeline.prepare.tokenizer import TokenizerFile, train_byte_level_bpe
from data_pipeline.store.manifest import digest_of

REQUEST_NAME = "request.json"
# More text than this does not change the merges of a vocabulary of usual size.
_TOKENIZER_TRAINING_BYTES = 1 << 28


@dataclass(frozen=True)
class MediaRequest:
    """The pieces of input, the options, and what had to be found out first: the ``tokenizer`` (None: no text is
    tokenised) and, for latents, what each sample holds (the manifest's ``latents``)."""

    options: MediaOptions
    pieces: list[Piece]
    tokenizer: TokenizerFile | None
    latents: dict[str, Any] | None

    @property
    def layout(self) -> LatentLayout | None:
        """What each latent sample holds."""
        return None if self.latents is None else LatentLayout.of({"latents": self.latents})

    def to_json(self, digest: str) -> dict[str, Any]:
        """As JSON; ``digest`` tells whether unfinished work can be taken up."""
        return {
            "digest": digest,
            "options": asdict(self.options),
            "pieces": [piece.to_json() for piece in self.pieces],
            "tokenizer": None if self.tokenizer is None else asdict(self.tokenizer),
            "latents": self.latents,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> MediaRequest:
        """From :meth:`to_json`."""
        options = dict(tree["options"])
        options["shape"] = None if options["shape"] is None else tuple(options["shape"])
        return cls(
            MediaOptions(**options),
            [Piece.from_json(piece) for piece in tree["pieces"]],
            None if tree["tokenizer"] is None else TokenizerFile(**tree["tokenizer"]),
            tree["latents"],
        )


def inputs_digest(pieces: list[Piece], choices: dict[str, Any]) -> str:
    """Tells one input and its options from another."""
    return digest_of([[[p.form, p.name, p.size, p.version, p.start, p.samples] for p in pieces], choices])


def held_out_below(options: MediaOptions) -> int:
    """Samples whose split word is smaller are held out."""
    return int(options.validation_fraction * 2**64)


def find_layout(pieces: list[Piece], options: MediaOptions) -> dict[str, Any]:
    """The manifest's ``latents``, from the first sample that can be used.

    Raises ValueError when there is none.
    """
    converter = LatentConverter(options, None, None)
    first: RejectError | None = None
    for piece in pieces:
        for raw in read_piece(piece, options):
            try:
                if raw.problem is not None:
                    raise raw.problem
                return converter.describe(converter(raw, ""))
            except RejectError as error:
                first = first or RejectError(f"{raw.source}: {error.reason}", error.detail)
    raise ValueError(f"no latent can be used; the first: {first}. What to do: check the source and --shape.")


def train_tokenizer(pieces: list[Piece], options: MediaOptions) -> TokenizerFile:
    """A byte-level BPE of the text of training documents; held-out documents shape nothing."""
    threshold = held_out_below(options)
    total = sum(piece.size for piece in pieces if piece.form == LINES)
    # Documents are taken by a hash of their own when there are more than enough.
    share = min(1.0, 2 * _TOKENIZER_TRAINING_BYTES / max(total, 1))

    def texts() -> Iterator[str]:
        left = _TOKENIZER_TRAINING_BYTES
        for piece in pieces:
            for record in _records(piece, options):
                order, split = sample_keys(options.seed, "tokenizer", record)
                if split < threshold or int.from_bytes(order[:8], "little") >= share * 2**64:
                    continue
                try:
                    segments = parse_segments(record)
                except RejectError:
                    continue
                for segment in segments:
                    if segment["type"] == "text":
                        left -= len(segment["text"])
                        yield segment["text"]
                if left < 0:
                    return

    return train_byte_level_bpe(texts(), options.vocab_size)


def _records(piece: Piece, options: MediaOptions) -> Iterator[bytes]:
    if piece.form == LINES:
        for raw in read_piece(piece, options):
            yield raw.parts[RECORD]
        return
    for name, payload in tar_members(piece, options.max_bytes, (RECORD,)):
        del name
        yield payload
