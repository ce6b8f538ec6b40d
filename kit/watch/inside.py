"""The model from inside, for TensorBoard and W&B: attention, the vectors of the tokens, a text of its own."""

import time

import numpy as np
import torch

from kit.base import devices, ranks
from kit.data import tokens
from kit.watch import evaluation, samples

SAMPLE_LENGTH = 100  # tokens of the texts
EMBEDDINGS = 2000  # as many token vectors as TensorBoard's projector moves about with ease
ATTENTION_TOKENS = 48  # of the row whose attention is shown


def show(journal, step, model, data, meta, device, is_last):
    """
    A text of the model's own for TensorBoard and W&B, and now and then, with a hundredth of the time that the run
    takes, pictures: attention, loss curve, token embeddings. Draws from torch's generator.
    """
    if not journal.sinks:
        return
    if ranks.is_fsdp:  # in a pass of a model in parts all processes would have to take part
        if is_last:
            show_loss_curve(journal, step)
        return
    start = time.time()
    ids = devices.send(data.fetch(np.array([0]))[0][0, :ATTENTION_TOKENS], device)
    n_vectors = min(EMBEDDINGS, meta['vocab_size'])
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        label = lambda i: shown(tokens.decode(text, [int(i)]))
        if model.config.causal and step > 0:  # an untrained one has nothing to say
            journal.show('text', step, 'Samples',
                         lambda: samples.write(model, text, meta, SAMPLE_LENGTH, device, 'float32'))
    except OSError:  # the tokenizer had to be downloaded, and could not
        label = str
    if is_last or start > journal.pictures_due:
        from kit.watch import pictures
        journal.show('image', step, 'Attention', lambda: pictures.attention(
            attention(model, ids), [label(i) for i in ids.tolist()]))
        show_loss_curve(journal, step)
        journal.show('embedding', step, 'Tokens', lambda: model.token_vectors()[:n_vectors].float().cpu(),
                     lambda: [label(i) for i in range(n_vectors)])
        journal.pictures_due = time.time() + 100 * (time.time() - start)


def show_loss_curve(journal, step):
    from kit.watch import pictures
    journal.show('image', step, 'Loss_curve', lambda: pictures.loss_curve(journal.history, f'step {step}'))


@torch.no_grad()
def attention(model, ids):
    """
    Who looks where over one row of ids (T,), in every layer and head: an array (L, H, T, T), in float32. A layer is a
    module with a method weights, which says so of what comes into its forward.
    """
    maps, layers = [], [module for module in model.modules() if hasattr(module, 'weights')]
    if not layers:
        raise ValueError('no module of the model has a method weights, which says who looks where')
    hooks = [layer.register_forward_pre_hook(lambda layer, args: maps.append(layer.weights(*args))) for layer in layers]
    try:
        with evaluation.evaluating(model):
            model.hidden(ids[None])  # nothing is compiled or cast here
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)[:, 0].cpu().numpy()


def shown(text):
    """A token as a label: line breaks as they are written in code, blanks in quotes."""
    return repr(text)[1:-1] if text.strip(' ') else repr(text)
