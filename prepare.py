"""
Turn text into a dataset folder: data/<name>/train.bin, val.bin, test.bin and what describes them.

$ python prepare.py shakespeare_char                                    a known dataset: python_docs,
                                                                        shakespeare_char, shakespeare, openwebtext
$ python prepare.py shakespeare_char --input=input.txt                  the same where there is no network
$ python prepare.py --input=book.txt --dataset=book --tokenizer=gpt2    any text of yours, a file or a folder
"""

import re

from kit import corpora, overrides

# ---------------------------------------------------------------------------------------------------------------------
# settings

dataset = ''                # the name of the folder in data/; a known name can stand alone: prepare.py shakespeare
input = ''                  # a file of text, or a folder with .txt, .md and .py files
tokenizer = ''              # char or gpt2; '' = char, or what the known dataset has
overwrite = False           # replace a dataset that is there already

names = []
overrides.apply(globals(), ['tokenizer in ("", "char", "gpt2")'], operands=names)
if len(names) > 1 or names and dataset:
    overrides.fail(f'{" ".join(names)}: one dataset at a time')
dataset = dataset or ''.join(names)
if not re.fullmatch(r'[\w-][\w.-]*', dataset):
    overrides.fail(f'dataset = {dataset!r}: it needs a name, such as --dataset=mytext, or one of '
                   f'{", ".join(corpora.SMALL + corpora.LARGE)}')

corpora.prepare(dataset, input, tokenizer, overwrite)
print(f'next: python train.py --dataset={dataset}')
