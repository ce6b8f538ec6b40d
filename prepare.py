"""
Turn text into a dataset folder: data/<name>/train.bin, val.bin, test.bin and what describes them.

$ python prepare.py shakespeare_char                                    a known dataset: python_docs, shakespeare_char,
                                                                        shakespeare, python_docstrings, openwebtext
$ python prepare.py shakespeare_char --input=input.txt                  the same where there is no network
$ python prepare.py --input=book.txt --dataset=book --tokenizer=gpt2    any text of yours: a file, a folder, a glob in
                                                                        quotes, several with commas between
$ python prepare.py --input='crawl/*.jsonl.zst' --dataset=crawl --tokenizer=bpe --vocab_size=8192
$ python prepare.py --input=hf:roneneldan/TinyStories --dataset=stories --tokenizer=gpt2
$ python prepare.py --input=english_german.tsv --dataset=translation    pairs: prompt, tab, response
$ zcat book.gz | python prepare.py --input=- --dataset=book

A document is a file of text (.txt .md .py, and any other that you name) or a row (.jsonl .json .csv .parquet, and
hf:NAME, which is streamed with the package datasets); .tsv holds pairs. All but .parquet may be packed, as .gz or .zst.
Behind each document stands the id of <|endoftext|>. The same mark inside a text is text, unless
--separator='<|endoftext|>' makes it the end of a document. With 100 documents or more each is whole in train, val or
test. Interrupted, it goes on with the same command.
"""

import re

from kit.base import overrides
from kit.data import corpora

# ---------------------------------------------------------------------------------------------------------------------
# settings

dataset = ''                # the name of the folder in data/; a known name can stand alone: prepare.py shakespeare
input = ''                  # files, folders, globs, with commas between; - = standard input; hf:NAME[:CONFIG[:SPLIT]]
tokenizer = ''              # char, byte, bpe (learned from the text), gpt2, ..., a dataset that has a bpe; '' = char
vocab_size = 4096           # 258 <= x <= 1_000_000: ids of bpe: 256 bytes, merges, and the end of text
text_key = 'text'           # the key or column of a row that holds its text
pairs = False               # the rows are pairs, with the keys prompt and response; a .tsv always is
split = '90,5,5'            # percent of train, val and test (0 = no test)
seed = 1337                 # >= 0: draws the documents of val and test
errors = 'strict'           # strict or replace: bytes that are no UTF-8 end it, the first named, or become U+FFFD
separator = ''              # a text that ends a document wherever it stands, such as <|endoftext|>; '' = none does
shard_size = 100_000_000    # >= 1000: tokens in a file; more of a split makes train_000000.bin, train_000001.bin, ...
overwrite = False           # replace a dataset that is there already

names = []
overrides.apply(globals(), operands=names)
if len(names) > 1 or names and dataset:
    overrides.fail(f'{" ".join(names)}: one dataset at a time')
dataset = dataset or ''.join(names)
if not re.fullmatch(r'[\w-][\w.-]*', dataset):
    overrides.fail(f'dataset = {dataset!r}: it needs a name, such as --dataset=mytext, or one of '
                   f'{", ".join(corpora.SMALL + corpora.LARGE)}')

folder = corpora.prepare(dataset, input, tokenizer, overwrite, vocab_size=vocab_size, text_key=text_key, pairs=pairs,
                         split=split, seed=seed, errors=errors, shard_size=shard_size, separator=separator)
has_pairs = (folder / 'train.rows.npy').exists()
print(f'next: python train.py --dataset={dataset}{" --batch_mode=padded" if has_pairs else ""}')
