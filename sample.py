"""
Let a trained GPT write.

$ python sample.py --start="To be" --num_samples=3              from best.pt of checkpoints/
$ python sample.py --start=FILE:prompt.txt --temperature=0      the prompt from a file; always the likeliest token
$ python sample.py --checkpoint=exp1_baseline/ckpt.pt
$ python sample.py --checkpoint=exp1/best.pt,exp2/best.pt       the mean of what several models say
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --max_new_tokens=100
"""

import sys
from itertools import islice

import torch

from kit.base import devices, files, overrides
from kit.base.errors import explained
from kit.data import prompts, tokens
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
compile = None              # torch.compile: True, False, None = where it pays, in very long texts

config = overrides.apply(globals(), [
    'not checkpoint or init_from == "resume"  # --checkpoint names what to sample from already; leave --init_from out',
    'init_from != "scratch"  # an untrained model has nothing to say; resume takes a checkpoint',
])
start = prompts.read(start) if 'start' in overrides.given else None

# ---------------------------------------------------------------------------------------------------------------------
# model and tokenizer

device = devices.choose_device(device)
dtype = devices.choose_dtype(dtype, device)
if init_from == 'resume':
    paths = files.paths(checkpoint) or [str(checkpoints.best(out_dir))]
    loaded = {path: checkpoints.load(path) for path in paths}
else:
    loaded = {init_from: pretrained.load(init_from, needs_tokenizer=True)}
models = [GPT(checkpoints.config_of(saved, GPTConfig, path)) for path, saved in loaded.items()]
seconds = max_new_tokens * sum(model.config.n_layer for model in models) / 1000  # about: 1 ms for each layer of a token
compile, reason = devices.choose_compile(compile, device, seconds)
print(f'compile: {compile} ({reason})')
for model, (path, saved) in zip(models, loaded.items()):
    if init_from == 'resume':
        print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
    checkpoints.fill(model, checkpoints.weights(saved, weights), path)
    model.eval().to(device)
    if compile:
        model.decode = torch.compile(model.decode, mode='reduce-overhead')  # on CUDA one CUDA graph a token

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

prompt, start = prompts.encode(start, text, meta, separator, path)
if not all(model.config.causal for model in models):
    overrides.fail(f'{path}: this model was trained to fill masks (objective = mlm), it cannot write')
if start and saved.get('config', {}).get('batch_mode') == 'padded':  # behind end_of_text comes the response
    prompt, start, stop = [*prompt, meta['end_of_text']], f'{start}\n', stop or tokens.END
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


shown = 0
with torch.inference_mode(), devices.autocast(device, dtype):  # nothing is trained behind it
    ids = models[0].stream(torch.tensor(rows, device=device), temperature, top_k, top_p, text.size, models[1:],
                           text.gaps, is_static=compile)
    for new in devices.fetched(islice(ids, max_new_tokens)):
        if (new < 0).any():
            print(f'sample.py: {", ".join(loaded)}: the logits of this model are not finite, as where a training '
                  'diverged; take an earlier --checkpoint, or train it with a lower --learning_rate', file=sys.stderr)
            raise SystemExit(1)
        for i, token in enumerate(new[:, 0].tolist()):
            if not is_done[i]:
                rows[i].append(token)
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
