"""
prepare.py against a loop over the documents with tiktoken: tokens a second, and the peak of its memory.

$ python bench/preparing.py                 100 MB of text in documents of 100 and of 2,000 characters, by GPT-2's BPE
$ python bench/preparing.py --memory        1 GB of text: the memory of all processes of prepare.py together (Linux)

loop:    json.loads, encode_ordinary(text) + [end of text], into an array for each split, which is written at the end
prepare: all that prepare.py does: resumable, hashed, described

Both read the same .jsonl, in turns, and write the same bytes. The documents are slices of the documentation of Python,
from places that are drawn. GPT-2's files come from FLATGPT_MIRROR, or are downloaded.
"""

import array
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.base import overrides
from kit.data import bins, corpora, tokens

megabytes = 100             # >= 1: of text, in each of the two files
tokenizer = 'gpt2'          # a name of tiktoken's; with --memory also char, byte, bpe
turns = 5                   # >= 1: of each
memory = False              # measure the memory instead, with 1 GB of text
single = False              # with --memory: the text is one document, a .txt


def write_documents(path, length, n_bytes):
    """A .jsonl of documents of this many characters."""
    text = '\n\n'.join(document for _, document in corpora.python_documentation())
    text, rng = text.encode('ascii', 'ignore').decode(), random.Random(1)
    with open(path, 'w') as file:
        for _ in range(n_bytes // length):
            place = rng.randrange(len(text) - length)
            document = text[place:place + length]
            file.write(document if single else json.dumps({'text': document}) + '\n')


def loop(path, folder):
    """What everybody writes first. Returns the number of tokens."""
    encoding = bins.load_encoding(tokenizer)
    codes = bins.deal(0, sum(1 for _ in open(path)), [90, 5, 5], 1337).tolist()
    parts = [array.array('H' if encoding.n_vocab <= 2**16 else 'I') for _ in bins.SPLITS]
    with open(path) as file:
        for line, code in zip(file, codes):
            parts[code].extend(encoding.encode_ordinary(json.loads(line)['text']) + [encoding.eot_token])
    for split, part in zip(bins.SPLITS, parts):
        (folder / f'{split}.bin').write_bytes(part.tobytes())
    return sum(map(len, parts))


def compare(place, length):
    path, folder = place / f'{length}.jsonl', place / 'data/loop'
    write_documents(path, length, megabytes * 10**6)
    folder.mkdir(exist_ok=True)
    seconds = {'loop': [], 'prepare': []}
    for _ in range(turns):
        start = time.perf_counter()
        n_tokens = loop(path, folder)
        seconds['loop'].append(time.perf_counter() - start)
        start = time.perf_counter()
        made = corpora.prepare('made', str(path), tokenizer, overwrite=True)
        seconds['prepare'].append(time.perf_counter() - start)
        for split in bins.SPLITS:
            assert tokens.sha256(made / f'{split}.bin') == tokens.sha256(folder / f'{split}.bin'), split
    rates = {name: [n_tokens / s / 1e6 for s in found] for name, found in seconds.items()}
    ratio = statistics.median(seconds['loop']) / statistics.median(seconds['prepare'])
    print(f'documents of {length:,} characters, {n_tokens:,} tokens, {bins.N_THREADS} cores: ' + ', '.join(
        f'{name} {statistics.median(found):.2f} M tokens/s ({min(found):.2f} to {max(found):.2f})'
        for name, found in rates.items()) + f': {ratio:.2f} x the loop, byte for byte the same')


def processes_of(pid):
    """A process and those below it."""
    with open(f'/proc/{pid}/task/{pid}/children') as file:
        return [pid] + [p for child in file.read().split() for p in processes_of(int(child))]


def bytes_of(pid):
    """Their proportional set size: what they share counts once."""
    total = 0
    for process in processes_of(pid):
        with open(f'/proc/{process}/smaps_rollup') as file:
            total += next(int(line.split()[1]) * 1024 for line in file if line.startswith('Pss:'))
    return total


def measure_memory(place):
    path = place / ('text.txt' if single else 'text.jsonl')
    write_documents(path, 2000, 10**9)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, ROOT / 'prepare.py', f'--input={path}', '--dataset=made',
                                f'--tokenizer={tokenizer}'])
    while process.poll() is None:
        try:
            peak = max(peak, bytes_of(process.pid))
        except (OSError, StopIteration):  # it has just ended
            pass
        time.sleep(0.05)
    print(f'{path.stat().st_size / 1e9:.2f} GB by {tokenizer} in {time.perf_counter() - start:.0f} s: '
          f'at most {peak / 2**20:.0f} MiB for all processes together')


overrides.apply(globals())
with tempfile.TemporaryDirectory() as temporary:
    if 'FLATGPT_MIRROR' in os.environ:
        os.environ['FLATGPT_MIRROR'] = os.path.abspath(os.environ['FLATGPT_MIRROR'])
    os.chdir(temporary)
    os.mkdir('data')
    if memory:
        measure_memory(Path(temporary))
    else:
        for length in 100, 2000:
            compare(Path(temporary), length)
