"""
Let a trained GPT write.

$ python sample.py --start="To be" --num_samples=3              from best.pt of checkpoints/
$ python sample.py --start=FILE:prompt.txt --temperature=0      the prompt from a file; always the likeliest token
$ python sample.py --checkpoint=exp1_baseline/ckpt.pt
$ python sample.py --checkpoint=exp1/best.pt,exp2/best.pt       the mean of what several models say
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
"""

from pathlib import Path

import torch

from kit.base import devices, overrides
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
num_samples = 1             # >= 1: drawn side by side as one batch; a single one is shown as it is written
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
    try:
        start = Path(start[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        overrides.fail(f'start = {start!r}: the file cannot be read ({error})')
    if not start:
        overrides.fail(f'start = {config["start"]!r}: the file is empty, and a prompt needs at least one character')

# ---------------------------------------------------------------------------------------------------------------------
# model and tokenizer

device = devices.choose_device(device)
dtype = devices.choose_dtype(dtype, device)
if init_from == 'resume':
    paths = [path for path in checkpoint.split(',') if path] or [str(checkpoints.best(out_dir))]
    loaded = {path: checkpoints.load(path) for path in paths}
else:
    loaded = {init_from: pretrained.load(init_from)}
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
meta = saved.get('meta') or tokens.read_meta(tokens.dataset_folder(dataset))
if meta['vocab_size'] > saved['model_args']['vocab_size']:
    overrides.fail(f'{path}: its tokenizer stands in data/{dataset}/meta.pkl, and that is not here; copy the folder')
for other, saved in loaded.items():
    if not tokens.is_same_tokenizer(saved.get('meta', meta)['tokenizer'], meta['tokenizer']):
        overrides.fail(f'{other} and {path} have different tokenizers; only models that read the same ids can be mixed')
try:
    text = tokens.tokenizer(meta['tokenizer'])
    prompt = text.encode(start) if 'start' in overrides.given else tokens.beginning(text, meta)
except ValueError as error:
    overrides.fail(f'start: {error}')
except OSError as error:
    overrides.fail(f'the files of the tokenizer {meta["tokenizer"]["name"]} could not be downloaded '
                   f'({type(error).__name__}); give a folder FLATGPT_MIRROR with them in tiktoken/')

# ---------------------------------------------------------------------------------------------------------------------
# write

if not all(model.config.causal for model in models):
    overrides.fail(f'{path}: this model was trained to fill masks (objective = mlm), it cannot write')
if prompt == [meta.get('end_of_text')]:
    start = ''
elif saved.get('config', {}).get('batch_mode') == 'padded':  # behind end_of_text comes the response, up to the next
    prompt, start, stop = [*prompt, meta['end_of_text']], f'{start}\n', stop or tokens.END
torch.manual_seed(seed)
rows = [list(prompt) for _ in range(num_samples)]  # ids, the prompt first
is_done = [False] * num_samples
tail = len(stop.encode())  # as many tokens are sure to hold the text to stop at


def written(row):
    """The text of a row, up to where it stops."""
    new = tokens.decode(text, row[len(prompt):])
    return start + (new.split(stop, 1)[0] if stop else new)


shown = 0
with devices.autocast(device, dtype):
    ids = models[0].stream(torch.tensor(rows, device=device), temperature, top_k, top_p, text.size, models[1:])
    for _ in range(max_new_tokens):
        for i, new in enumerate(next(ids)[:, 0].tolist()):
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
