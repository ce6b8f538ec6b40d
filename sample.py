"""
Let a trained GPT write.

$ python sample.py --start="To be" --num_samples=3              from best.pt of checkpoints/
$ python sample.py --start=FILE:prompt.txt --temperature=0      the prompt from a file; always the likeliest token
$ python sample.py --checkpoint=exp1_baseline/ckpt.pt
$ python sample.py --checkpoint=exp1/best.pt,exp2/best.pt       the mean of what several models say
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
"""

import sys

import torch

from kit.base import devices, files, overrides
from kit.base.errors import explained
from kit.data import tokens
from kit.state import checkpoints, pretrained
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# settings

init_from = 'resume'        # resume (a checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder
out_dir = 'checkpoints'     # where the checkpoint is: best.pt, else ckpt.pt
checkpoint = ''             # or this very file, or several: a.pt,b.pt
weights = 'auto'            # auto, raw, ema or swa: of a checkpoint's weights; auto = its average where it has one
start = '\n'                # not empty: at least one character, or FILE:prompt.txt; if not given, documents begin anew
separator = ''              # the text in start that is the end of a document; '' = that of the model's dataset, if any
num_samples = 1             # 1 <= x <= 100_000: drawn side by side as one batch; one alone is shown as it is written
max_new_tokens = 500        # >= 1: tokens in each, at most
temperature = 0.8           # >= 0: below 1 bolder, above 1 wilder; 0 = always the likeliest token
top_k = 200                 # >= 0: only the k likeliest tokens; 0 = all
top_p = 1.0                 # 0 < x <= 1: only the likeliest tokens that together reach this probability
stop = ''                   # end where this text appears
seed = 1337                 # 0 <= x < 2**63: another seed, another text
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16 or float16
compile = False             # torch.compile: takes half a minute, pays in long texts

config = overrides.apply(globals(), [
    'not checkpoint or init_from == "resume"  # --checkpoint names what to sample from already; leave --init_from out',
    'init_from != "scratch"  # an untrained model has nothing to say; resume takes a checkpoint',
])
if start.startswith('FILE:'):
    with explained(f'start = {start!r}: the file cannot be read', 'a prompt is text in UTF-8'):
        start = tokens.read_prompt(start[5:])
    if not start:
        overrides.fail(f'start = {config["start"]!r}: the file is empty, and a prompt needs at least one character')

# ---------------------------------------------------------------------------------------------------------------------
# model and tokenizer

device = devices.choose_device(device)
dtype = devices.choose_dtype(dtype, device)
if init_from == 'resume':
    paths = files.paths(checkpoint) or [str(checkpoints.best(out_dir))]
    loaded = {path: checkpoints.load(path) for path in paths}
else:
    loaded = {init_from: pretrained.load(init_from, needs_tokenizer=True)}
models = []
for path, saved in loaded.items():
    if init_from == 'resume':
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
    model = GPT(checkpoints.config_of(saved, GPTConfig, path))
    checkpoints.fill(model, checkpoints.weights(saved, weights), path)
    model.eval().to(device)
    if compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)  # one graph, however many tokens lie in the cache
    models.append(model)

# nanoGPT's checkpoints do not hold their tokenizer, but they name the dataset
dataset = saved.get('config', {}).get('dataset', '')
if not dataset and 'meta' not in saved:
    overrides.fail(f'{path} names neither its tokenizer nor its dataset, so nobody knows what its ids mean')
meta = saved.get('meta') or tokens.read_meta(tokens.dataset_folder(dataset))
if meta is tokens.GPT2 and init_from == 'resume':
    print(f"{path} names no tokenizer that is here: its ids are taken for GPT-2's")
for other, saved in loaded.items():
    if not tokens.is_same_tokenizer(saved.get('meta', meta)['tokenizer'], meta['tokenizer']):
        overrides.fail(f'{other} and {path} have different tokenizers; only models that read the same ids can be mixed')
    if meta['vocab_size'] > saved['model_args']['vocab_size']:
        overrides.fail(f'{other}: its tokenizer stands in data/{dataset}/meta.pkl, which is not here; copy the folder')
with explained(f'the files of the tokenizer {meta["tokenizer"].get("name", "")} could not be downloaded',
               'give a folder FLATGPT_MIRROR with them in tiktoken/'):
    text = tokens.tokenizer(meta['tokenizer'])

# ---------------------------------------------------------------------------------------------------------------------
# prompt

end = meta.get('end_of_text')
if separator and end is None:
    overrides.fail(f'separator = {separator!r}: {path} knows no end of a document, its text was a single one')
separator = separator or meta.get('separator', '')
if 'start' not in overrides.given:
    prompt = tokens.beginning(text, meta)
    if tokens.decode(text, prompt) != start and prompt != [end]:
        start = tokens.decode(text, prompt)
        print(f'start: {start!r}, since this model knows no line break')
else:
    if tokens.END in start and tokens.END != separator:
        remedy = '' if end is None else f"; --separator='{tokens.END}' makes it the end of a document"
        print(f'start: {tokens.END} stands there as plain text{remedy}')
    try:
        prompt = tokens.encode_prompt(text, start, separator, end)
    except ValueError as error:
        overrides.fail(f'start: {error}')
if not prompt:
    overrides.fail(f'start = {start!r}: nothing in it is a token of this model')
if max(prompt) >= meta['vocab_size']:
    overrides.fail(f'start: {path} knows {meta["vocab_size"]:,} ids, and the prompt holds the id {max(prompt)}')
if not all(model.config.causal for model in models):
    overrides.fail(f'{path}: this model was trained to fill masks (objective = mlm), it cannot write')
if prompt == [end]:
    start = ''
elif saved.get('config', {}).get('batch_mode') == 'padded':  # behind end_of_text comes the response, up to the next
    prompt, start, stop = [*prompt, end], f'{start}\n', stop or tokens.END
block_size = min(model.config.block_size for model in models)
if len(prompt) > block_size:
    print(f'start: it has {len(prompt):,} tokens, and the model sees the last {block_size:,}')

# ---------------------------------------------------------------------------------------------------------------------
# write

torch.manual_seed(seed)
rows = [list(prompt) for _ in range(num_samples)]  # ids, the prompt first
is_done = [False] * num_samples
tail = len(stop.encode(errors='surrogateescape'))  # as many tokens are sure to hold the text to stop at


def written(row):
    """The text of a row, up to where it stops."""
    new = tokens.decode(text, row[len(prompt):])
    return start + (new.split(stop, 1)[0] if stop else new)


def next_ids():
    """The next id of each row; where the model has none to give the script ends, with status 1."""
    try:
        return next(ids)[:, 0].tolist()
    except FloatingPointError as error:
        print(f'sample.py: {", ".join(loaded)}: {error}, as where a training diverged; take an earlier --checkpoint, '
              'or train it with a lower --learning_rate', file=sys.stderr)
        raise SystemExit(1) from None


shown = 0
with devices.autocast(device, dtype):
    ids = models[0].stream(torch.tensor(rows, device=device), temperature, top_k, top_p, text.size, models[1:],
                           text.gaps)
    for _ in range(max_new_tokens):
        for i, new in enumerate(next_ids()):
            if not is_done[i]:
                rows[i].append(new)
                is_done[i] = bool(stop) and stop in tokens.decode(text, rows[i][len(prompt):][-tail:])
        if all(is_done):
            break
        if num_samples == 1:  # show what can no longer change: half a character, half a stop text can
            sure = written(rows[0]).rstrip('\N{REPLACEMENT CHARACTER}')
            sure = sure[:len(sure) - len(stop)] if stop else sure
            print(sure[shown:], end='', flush=True)
            shown = max(shown, len(sure))
for row in rows:
    print(written(row)[shown:])
    if num_samples > 1:
        print('---------------')
