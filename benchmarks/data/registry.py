"""The contenders and the environments that they run in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """``module`` below ``contenders/`` with its ``variant``; ``workers`` are the process counts to measure.

    ``settings`` goes into the record of results.
    """

    name: str
    module: str
    variant: str
    settings: str
    environment: str = "project"
    workers: tuple[int, ...] = (0, 2)


TEXT = (
    Contender(
        "ours",
        "ours",
        "lean",
        "global order, best-fit packing, hash of every member; one blocking thread; lean batches",
        workers=(0,),
    ),
    Contender(
        "ours, unpacked on the host",
        "ours",
        "full",
        "as above, with segment and position ids, loss mask and cu_seqlens made on the host",
        workers=(0,),
    ),
    Contender(
        "webdataset, block members",
        "webdataset_blocks",
        "rows",
        "our shards; shards shuffled, rows of a block permuted",
    ),
    Contender(
        "webdataset, block members, documents shuffled",
        "webdataset_blocks",
        "documents",
        "our shards; shards shuffled, documents of a block permuted, concatenated and cut",
    ),
    Contender(
        "webdataset, document members",
        "webdataset_documents",
        "default",
        "TarWriter and .decode() as they come, shuffle(1000), concatenated and cut",
    ),
    Contender(
        "webdataset, document members, tuned",
        "webdataset_documents",
        "tuned",
        "plain ustar headers, arrays viewed in place, shuffle(1000), concatenated and cut",
    ),
    Contender(
        "litdata",
        "litdata_tokens",
        "tokens",
        "TokensLoader over uint16 chunks of 4,096 rows, shuffle=True",
        environment="litdata",
    ),
    Contender(
        "Megatron-Core GPTDataset",
        "megatron_gpt",
        "full",
        "memory-mapped .bin/.idx, the whole dictionary of its training loop, no attention mask",
    ),
    Contender(
        "Megatron-Core GPTDataset, tokens only",
        "megatron_gpt",
        "tokens",
        "as above, only the token rows",
    ),
    Contender(
        "Energon, block members",
        "energon_text",
        "blocks",
        "our shards; generating encode_sample hands out whole batches of permuted rows",
    ),
    Contender(
        "Energon, document members",
        "energon_text",
        "documents",
        "shuffle buffer 1,000, packing buffer 256 documents, whole batches",
    ),
    Contender(
        "mosaicml-streaming",
        "mosaicml_mds",
        "mds",
        "packed rows in MDS shards of 64 MB, py1e shuffle, everything prepared ahead",
        environment="mosaicml",
    ),
)


IMAGES = (
    Contender("ours", "images_ours", "simplejpeg", "decode threads; global order, hashes"),
    Contender("webdataset, simplejpeg", "images_webdataset", "simplejpeg", "shuffle(500), batches made by workers"),
    Contender("webdataset, PIL", "images_webdataset", "pil", "as above"),
    Contender("Energon, simplejpeg", "images_energon", "simplejpeg", "crude samples, shuffle buffer 500"),
    Contender("Energon, PIL", "images_energon", "pil", "as above"),
)


@dataclass(frozen=True)
class Environment:
    """Packages laid over the project's own environment; installed without their dependencies' own torch."""

    packages: tuple[str, ...]


ENVIRONMENTS = {
    "litdata": Environment(("litdata==0.2.76", "lightning-utilities>=0.15", "tifffile")),
    "mosaicml": Environment(
        (
            "mosaicml-streaming==0.13.0",
            "numpy<2.2",
            "xxhash<4",
            "transformers<5",
            "huggingface_hub<1",
            "tokenizers<0.23",
            "Brotli",
            "python-snappy<1",
            "cramjam",
            "zstd",
            "catalogue<3",
        )
    ),
}
