"""Give a downloaded model's tokenizer.json the tags of the search task, in place.

    python tools/add_search_tags.py FOLDER

New tags take ids that the model's embedding has rows for and its tokenizer does not use. What these rows hold means
nothing until demonstrations have been learnt (docs/recipes.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from megatron_pbsd.environments.search_qa.tokenizer import SPECIAL_TOKENS


def main(folder: Path) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        sys.exit(f"{path} does not exist: the search task reads this file, in the format of the library `tokenizers`")
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = Tokenizer.from_file(str(path))
    new = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    # A tag that is there already becomes special too: text can then not be read as one.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if max(ids.values()) >= rows:
        sys.exit(f"{path} has no room: its tags would have ids up to {max(ids.values())}, and the model's embedding "
                 f"has vocab_size = {rows} rows")
    written = path.with_suffix(".new")
    tokenizer.save(str(written))
    written.replace(path)
    print(f"{path}: {len(new)} tags added; " + ", ".join(f"{token} {number}" for token, number in ids.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
