"""
How a GPT is trained: the algorithm alone, to be read once from top to bottom. To change a setting, edit it here.

$ python prepare.py python_docs && python minimal.py    two minutes on two cores; it leaves minimal.pt

On a CPU train.py config/train_python_docs_gpt2.py --dtype=float32 --compile=False has the same losses, bit for bit, and
adds exact resume, verified checkpoints, mixed precision, several GPUs, other blocks, a way past bad numbers and more.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# settings: the names are those of train.py, the values those of config/train_python_docs_gpt2.py
dataset = 'python_docs'                 # a folder in data/, see prepare.py
batch_size, block_size = 12, 64         # rows in a micro-step; tokens in a row: how far back the model can look
gradient_accumulation_steps = 1         # micro-steps in a step: for batches that do not fit the memory at once
n_layer, n_head, n_embd = 2, 2, 128     # blocks, one after the other; attention heads in each; channels
max_iters, warmup_iters = 4000, 100     # steps, that is updates of the weights; those at first, in which the rate rises
learning_rate, min_lr = 4e-3, 1e-4      # the rate after this warmup, and at the end
beta1, beta2 = 0.9, 0.99                # memory of the mean gradient, and of its square
weight_decay, grad_clip = 1e-1, 1.0     # the pull of matrices towards 0; longer gradients are scaled down to this norm
eval_interval, eval_iters = 400, 40     # steps between evaluations; batches that one takes from each split
log_interval, seed = 50, 1337           # steps between iter lines; another seed, other first weights and other batches

# ---------------------------------------------------------------------------------------------------------------------
# data: train.bin and val.bin are a long row of token ids each, and meta.json says what the ids stand for
folder = Path('data', dataset) if Path('data', dataset).is_dir() else Path(__file__).parent / 'data' / dataset
if not all((folder / name).is_file() for name in ('meta.json', 'train.bin', 'val.bin')):
    raise SystemExit(f'minimal.py: {folder} is no dataset; python prepare.py python_docs makes one, or --input=FILE')
meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
data = {split: np.memmap(folder / f'{split}.bin', dtype=meta['dtype'], mode='r') for split in ('train', 'val')}
device = 'cuda' if torch.cuda.is_available() else 'cpu'


def get_batch(split, starts):
    """B rows of T = block_size ids of a text, which begin at starts (B,): x, and y, what comes after each of them."""
    places = starts[:, None] + np.arange(block_size)  # (B, T)
    x, y = data[split][places], data[split][places + 1]  # (B, T) each
    return torch.from_numpy(x.astype(np.int64)).to(device), torch.from_numpy(y.astype(np.int64)).to(device)


@torch.no_grad()
def evaluate(split):
    """The mean loss of a token, in evenly spaced rows, the same each time; of a short text some come twice."""
    n, at_once = eval_iters * batch_size, max(1, 4096 // block_size)  # rows, and those side by side
    starts = np.arange(n) * ((len(data[split]) - 1) // block_size) // n * block_size  # (n,)
    total = 0.0  # a Python float is a float64: float32 would lose digits in a long sum
    for i in range(0, n, at_once):
        x, y = get_batch(split, starts[i:i + at_once])
        total += (model(x, y)[1] * y.numel()).item()
    return total / (n * block_size)


# ---------------------------------------------------------------------------------------------------------------------
# model and optimizer; matrix products are fastest where a large vocabulary is a multiple of 64
torch.manual_seed(seed)
vocab_size = meta['vocab_size'] if meta['vocab_size'] < 1024 else math.ceil(meta['vocab_size'] / 64) * 64
args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size, bias=False)
model = GPT(GPTConfig(**args)).to(device)
decay = {'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': weight_decay}
no_decay = {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}  # gains belong near 1
optimizer = torch.optim.AdamW([decay, no_decay], lr=learning_rate, betas=(beta1, beta2), fused=True)


def get_lr(step):
    if step < warmup_iters:  # AdamW's memory is empty at first: small steps
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = (step - warmup_iters) / (max_iters - warmup_iters)  # 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)  # half a cosine


# ---------------------------------------------------------------------------------------------------------------------
# training: step is the number of updates made so far, so 0 is the untrained model
for step in range(max_iters + 1):
    if step % eval_interval == 0 or step == max_iters:
        val_loss = evaluate('val')
        print(f'step {step}: train loss {evaluate("train"):.4f}, val loss {val_loss:.4f}')
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': args, 'meta': meta,
                    'iter_num': step, 'best_val_loss': val_loss, 'config': {'dataset': dataset}}, 'minimal.tmp')
        Path('minimal.tmp').replace('minimal.pt')  # at once: a run that is killed leaves a whole file, old or new
    if step == max_iters:
        break

    rng = np.random.default_rng((seed, step))  # the rows of a step depend on its number alone
    starts = rng.integers(len(data['train']) - block_size, size=(gradient_accumulation_steps, batch_size))
    loss_of_step = 0.0
    for micro_step in range(gradient_accumulation_steps):
        x, y = get_batch('train', starts[micro_step])  # (B, T) each
        _, loss = model(x, y)  # the mean over the targets y
        loss = loss / gradient_accumulation_steps  # so that their sum is the mean of the step
        loss.backward()  # adds to the gradients of the micro-steps before
        loss_of_step += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)  # one odd batch must not throw the weights far off
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step)
    optimizer.step()
    optimizer.zero_grad()
    if step % log_interval == 0:
        print(f'iter {step}: loss {loss_of_step.item():.4f}, lr {get_lr(step):.1e}')

ids = model.generate(torch.tensor([[0]], device=device), 400, temperature=0.8, n_ids=meta['vocab_size'])[0].tolist()
chars = meta['tokenizer'].get('chars')  # other tokenizers have none: then the ids are shown, and sample.py knows how
print(''.join(chars[i] for i in ids) if chars else ids)
