"""What train.py does before training, after it, or instead of it."""

import math
import time

import torch

from kit import devices, evaluation, tokens

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


def test(model, splits, meta, batch_size, device, dtype):
    """Measure the whole test split; where a dataset has none, val, and say so."""
    split = 'test' if 'test' in splits else 'val'
    if split == 'val':
        print('this dataset has no test.bin: val is taken')
    print(f'splits: {meta.get("split", "as they were found")}')
    loss, accuracy = evaluation.measure(model, splits[split], model.config.block_size, batch_size, 0, device, dtype)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    print(f'{split} loss {loss:.4f}, perplexity {perplexity:.3f}, accuracy {accuracy:.2%} '
          f'({len(splits[split]) - 1:,} tokens)')


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
    where = '' if out_dir == 'checkpoints' else f' --out_dir={out_dir}'
    run = '' if out_dir == 'checkpoints' else f' {out_dir}'
    print('next:')
    print(f'  python sample.py{where} --num_samples=3      more of its writing, after a --start of yours')
    print(f'  python plot_loss.py{run}      the loss curve as a picture')
    print(f'  python train.py --test{where}      loss, perplexity and accuracy on the test split')
