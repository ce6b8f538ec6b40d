"""What train.py does before training, after it, or instead of it."""

import math
import shlex
import time
from pathlib import Path

import torch

from kit import averages, checkpoints, devices, evaluation, ranks, tokens

FIRST_LOSS_OFF = 0.5  # nats: GPT-2's initialisation starts within 0.1 of a fair guess, a broken one far from it


def first_look(model, raw_model, x, y, meta, device, dtype, from_scratch):
    """
    Show one micro-step, x and y (B, T), before any training: shapes, a piece of the text, and whether a new model's
    first loss is that of a fair guess, ln(vocab_size). model is raw_model as it will be trained, wrapped and compiled:
    what is compiled here is what the training runs. Returns the seconds of one pass forward and backward.
    """
    c, n_params = raw_model.config, raw_model.count_params()
    memory = devices.estimate_memory(raw_model.count_params(non_embedding=False), x.numel(), c, dtype, device)
    print(f'model: {n_params / 1e6:.2f}M parameters in {c.n_layer} layers of {c.n_head} heads and {c.n_embd} channels; '
          f'training takes about {memory / 2**30:.2f} GiB of memory beside the program')
    print(f'one micro-step: x {tuple(x.shape)}, y {tuple(y.shape)}; y is x moved on by one token')
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        for name, ids in ('x', x[0, :40].tolist()), ('y', y[0, :40].tolist()):
            print(f'  {name}[0] = {ids[:6]}... = {tokens.decode(text, ids)!r}...')
    except OSError:
        print(f'  x[0] = {x[0, :16].tolist()}... (the files of the tokenizer could not be downloaded)')
    seconds, first_loss = [], None
    for _ in range(2):  # the first pass warms up
        start = time.perf_counter()
        with devices.autocast(device, dtype):
            _, loss = model(x, y)
        loss.backward()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - start)
        first_loss = first_loss or loss.item()
    model.zero_grad(set_to_none=True)
    guess = math.log(c.vocab_size)
    print(f'first loss: {first_loss:.4f}; a fair guess among {c.vocab_size:,} ids would have {guess:.4f}')
    if from_scratch and not abs(first_loss - guess) < FIRST_LOSS_OFF:
        print('WARNING: a new model should start near a fair guess; look at the initialisation and at the data')
    return min(seconds)


def test(models, splits, meta, batch_size, device, dtype):
    """
    Measure the whole test split; where a dataset has none, val, and say so. models: {name: model}; several of them
    are followed by their ensemble.
    """
    split = 'test' if 'test' in splits else 'val'
    if split == 'val':
        print('this dataset has no test.bin: val is taken')
    print(f'splits: {meta.get("split", "as they were found")}')
    if len(models) > 1:
        models = models | {'ensemble': evaluation.Ensemble(models.values())}
    bytes_per_token = tokens.bytes_per_token(meta, splits[split][1:])
    for name, model in models.items():
        block_size = model.config.block_size
        loss, accuracy = evaluation.measure(model, splits[split], block_size, batch_size, 0, device, dtype)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = f'{loss / math.log(2) / bytes_per_token:.4f}' if bytes_per_token else 'unknown'
        print(f'{split} loss {loss:.4f}, perplexity {perplexity:.3f}, accuracy {accuracy:.2%}, bits per byte {bits} '
              f'({len(splits[split]) - 1:,} tokens): {name}')


def go_back(out_dir, first_bad, model, optimizer, scaler, average):
    """
    Put a training back to its last checkpoint from before the step first_bad; bad steps left the weights as they were
    there, so that step's own would not do. Returns the step; None, and nothing changes, where there is no such one.
    """
    path, saved = checkpoints.before(out_dir, first_bad)
    if not saved:
        print(f'WARNING: every step since {first_bad} was bad, no checkpoint is from before: other text from here on')
        return None
    step = saved['iter_num']
    print(f'WARNING: every step since {first_bad} was bad: back to {path}, after {step} steps, with other text')
    checkpoints.restore(saved, model, optimizer, scaler)
    averages.restore(average, saved)
    if ranks.is_main:
        checkpoints.move_later_aside(out_dir, step)
    return step


def show_how_to_go_on(signal, step, out_dir):
    """What a run says that a signal has stopped."""
    where = '' if out_dir == 'checkpoints' else f' --out_dir={shlex.quote(out_dir)}'
    saved = checkpoints.peek(Path(out_dir) / 'ckpt.pt').get('iter_num', 0)
    if saved:
        print(f'{signal}: stopped after {step} steps; this goes on '
              f'{"as if it had not been" if saved == step else f"after step {saved}, the last that was saved"}:\n'
              f'  python train.py{where} --init_from=resume')
    else:
        print(f'{signal}: stopped after {step} steps; there is nothing to go on from yet')


def show_sample(model, meta, device, dtype, length=400):
    """Print a text of the model's own, as sample.py would begin it: after a line break."""
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        prompt = text.encode('\n')
    except (OSError, ValueError) as error:  # the tokenizer had to be downloaded, or knows no line break
        print(f'no sample: {error}')
        return
    model.eval()
    with devices.autocast(device, dtype):
        ids = model.generate(torch.tensor([prompt], device=device), length, temperature=0.8, n_ids=text.size)
    print(f'\na sample of its own:\n{tokens.decode(text, ids[0].tolist())}\n')


def show_next_commands(out_dir):
    """What is worth typing after a run."""
    name = shlex.quote(out_dir)
    where, run, average = ('', '', '') if out_dir == 'checkpoints' else (
        f' --out_dir={name}', f' {name}', f' --checkpoint_dir={name}')
    print('next:')
    print(f'  python sample.py{where} --num_samples=3      more of its writing, after a --start of yours')
    print(f'  python plot_loss.py{run}      the loss curve as a picture')
    print(f'  python train.py --test{where}      loss, perplexity and accuracy on the test split')
    print(f'  python checkpoint_averaging.py{average}      the last checkpoints as one, which may be better than any')
