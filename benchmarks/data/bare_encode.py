"""The bare loop that preparing is compared with: ``encode_batch`` of HF ``tokenizers`` over files, ids to uint16.

    python bare_encode.py TOKENIZER FOLDER THREADS

Reads the files first; prints seconds and tokens of the loop over groups of about 1 MiB as JSON. Nothing is shuffled,
checked or written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    os.environ["RAYON_NUM_THREADS"] = sys.argv[3]
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(sys.argv[1])
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sys.argv[2]).glob("*"))]
    groups: list[list[str]] = [[]]
    size = 0
    for text in texts:
        groups[-1].append(text)
        size += len(text)
        if size >= 1 << 20:
            groups.append([])
            size = 0
    tokens = 0
    started = time.perf_counter()
    for group in groups:
        for encoding in tokenizer.encode_batch(group, add_special_tokens=False):
            tokens += len(np.array(encoding.ids, dtype=np.uint16))
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}))


if __name__ == "__main__":
    main()
