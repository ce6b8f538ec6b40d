"""What a model writes: a text of its own, answers to prompts, the tokens that were hidden from it."""

import numpy as np
import torch

from kit.base import devices
from kit.data import readers, tokens
from kit.watch import evaluation


def show(model, data, meta, device, dtype):
    """
    Print what the model makes of its own: a text, as sample.py would begin it; for pairs, its answers to some prompts
    of data, the Rows of val; where it fills masks, how it does that. Raises OSError where the tokenizer had to be
    downloaded and could not, FloatingPointError where the run has diverged.
    """
    text, reader = tokens.tokenizer(meta['tokenizer']), data.readers[0]
    if data.is_mlm:
        print('\nwhat it fills in:\n{}\n{}\n'.format(*fill_masks(model, data, text, device, dtype)))
    elif isinstance(reader, readers.Padded):
        numbers, _ = reader.evenly(3)
        written, _ = answers(model, reader, numbers, text, len(numbers), device, dtype)
        for i, answer in zip(numbers, written):
            print(f'\nasked:\n{tokens.decode(text, reader.pair(i)[0][:-1])}\nits answer: {answer}')
        print()
    else:
        length = min(400, 8 * reader.block_size)  # a model that sees little has soon shown what it can do
        print(f'\na sample of its own:\n{write(model, text, meta, length, device, dtype)}\n')


def write(model, text, meta, length, device, dtype):
    """What the model writes of its own, so many tokens; text: a tokenizer. Draws from torch's generator."""
    begin = torch.tensor([tokens.beginning(text, meta)], device=device)
    with evaluation.evaluating(model), devices.autocast(device, dtype):
        ids = model.generate(begin, length, temperature=0.8, n_ids=text.size, gaps=text.gaps)
    return tokens.decode(text, ids[0].tolist())


def answers(model, reader, numbers, text, batch_size, device, dtype):
    """(answers, responses) to the prompts of some pairs, as texts. A prompt leaves space for the longest response."""
    pairs = [reader.pair(i) for i in numbers]
    longest = min(max(len(response) for _, response in pairs) + 1, max(1, reader.block_size // 2))
    prompts = [prompt[-(reader.block_size - longest + 1):] for prompt, _ in pairs]
    models = list(getattr(model, 'models', [model]))
    ids = evaluation.answer(models, prompts, reader.end_of_text, text, longest, batch_size, device, dtype)
    return [tokens.decode(text, row) for row in ids], [tokens.decode(text, response) for _, response in pairs]


@torch.no_grad()
def fill_masks(model, data, text, device, dtype):
    """The first row of data with its tokens hidden, and as the model fills it in: two texts."""
    x, y, documents = (devices.send(a, device) for a in data.fetch(np.array([0]), data.noise(1, 0)))
    with evaluation.evaluating(model), devices.autocast(device, dtype):
        logits, _ = model(x, y, documents)
    if not logits.isfinite().all():
        raise FloatingPointError('the logits of this model are not finite')
    logits[..., list(text.gaps)] = -torch.inf
    filled = torch.where(y >= 0, logits[..., :text.size].argmax(dim=-1), x)
    return [tokens.decode(text, ids[0].tolist()) for ids in (x, filled)]
