"""What a model is worth on a split. The model comes in as an argument, the data as rows."""

import math
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch.nn import functional as F

from kit.base import devices, ranks


class Ensemble(torch.nn.Module):
    """Several models as one that gives every token the mean of their probabilities."""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        # the one with the shortest rows sets their length; ids that not all of them know stand for nothing
        self.config = min((model.config for model in self.models), key=lambda config: config.block_size)
        self.n_ids = min(model.config.vocab_size for model in self.models)

    def forward(self, idx, targets, documents=None):
        """(B, T) ids and targets -> (log-probabilities (B, T, V), mean loss), as GPT.forward."""
        total = None
        for model in self.models:
            log_probs = F.log_softmax(model(idx, targets, documents)[0].float(), dim=-1)[..., :self.n_ids]  # (B, T, V)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
        total -= math.log(len(self.models))
        return total, F.nll_loss(total.flatten(0, 1), targets.flatten(), ignore_index=-1)


@contextmanager
def evaluating(model):
    """Without dropout; afterwards the model is as it was, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def figures(model, rows, split, batch_size, n, device, dtype):
    """
    {'val/loss', 'val/accuracy'} of the rows of a split, see measure; of a mixture the mean by its shares, and
    'val/loss/NAME' of each of its datasets.
    """
    found = {name: measure(model, part, batch_size, n and max(1, round(n * share)), device, dtype)
             for (name, part), share in zip(rows.parts.items(), rows.shares)}
    means = [sum(share * value for share, value in zip(rows.shares, values)) for values in zip(*found.values())]
    each = {f'{split}/loss/{name}': loss for name, (loss, _) in found.items()} if len(found) > 1 else {}
    return {f'{split}/loss': means[0], f'{split}/accuracy': means[1]} | each


def line(step, figures, kind=None):
    """The line that the log has of an evaluation. kind: ema or swa, where it is of the average."""
    told = (f'step {step}: train loss {figures["train/loss"]:.4f}, val loss {figures["val/loss"]:.4f}, '
            f'val accuracy {figures["val/accuracy"]:.2%}')
    if 'raw/val/loss' in figures:
        told += f', raw val loss {figures["raw/val/loss"]:.4f} (the others are of the {kind})'
    return told + ''.join(f', {name} {loss:.4f}' for name, loss in figures.items() if name.startswith('val/loss/'))


@torch.no_grad()
def measure(model, rows, batch_size, n, device, dtype):
    """
    (mean loss in nats, accuracy of the likeliest token), each over all targets of n evenly spaced rows of one dataset,
    the same each time; n = 0: of all rows. The ranks share the work. No random number is drawn but those that mask
    tokens where they are the targets, and these are the same each time too. Every batch has batch_size rows, so that a
    compiled model sees one shape: those that fill up the last one count nothing.
    """
    numbers, skip = rows.readers[0].evenly(n)
    noise = rows.noise(len(numbers), 0) if rows.is_mlm else None
    fill = -len(numbers) % (batch_size * ranks.world_size)
    order = np.pad(np.arange(len(numbers)), (0, fill), mode='edge')
    sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    with evaluating(model):
        for i in range(ranks.rank * batch_size, len(numbers), ranks.world_size * batch_size):
            here = order[i:i + batch_size]
            x, y, documents = rows.fetch(numbers[here], None if noise is None else noise[here])
            counts_not = np.arange(y.shape[1]) < skip[here, None]
            counts_not[max(0, len(numbers) - i):] = True
            x, y, documents = (devices.send(a, device) for a in (x, np.where(counts_not, np.int64(-1), y), documents))
            with devices.autocast(device, dtype):
                logits, loss = model(x, y, documents)
            count = (y >= 0).sum()
            total = torch.where(count > 0, loss * count, 0)  # where all targets are counted elsewhere there is no mean
            sums += torch.stack([total, (logits.argmax(dim=-1) == y).sum(), count]).to(sums.dtype)
    loss, right, count = ranks.total(sums).tolist()
    return loss / count, right / count


@torch.no_grad()
def token_losses(model, x, y, documents, batch_size, device, dtype):
    """The loss of every target y (n, T) of x, without dropout: (n, T) float32, in nats; 0 where nothing counts."""
    losses = []
    for i in range(0, len(x), batch_size):
        here = [devices.send(a if a is None else a[i:i + batch_size], device) for a in (x, y, documents)]
        with evaluating(model), devices.autocast(device, dtype):
            logits, _ = model(*here)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), here[1], ignore_index=-1, reduction='none').cpu())
    return torch.cat(losses).numpy()


@torch.no_grad()
def answer(models, prompts, end_of_text, text, longest, batch_size, device, dtype):
    """
    What models (one, or an ensemble) write after prompts, lists of ids: always the likeliest token, up to end_of_text
    or `longest` tokens. text: a tokenizer. Returns lists of ids without end_of_text. Prompts of one length are answered
    side by side. Raises FloatingPointError, see GPT.stream.
    """
    answers, by_length = {}, {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(devices.autocast(device, dtype))
        for same in by_length.values():
            for here in (same[i:i + batch_size] for i in range(0, len(same), batch_size)):
                ids = models[0].stream(torch.tensor([prompts[i] for i in here], device=device), temperature=0,
                                       n_ids=text.size, others=models[1:], gaps=text.gaps)
                rows, is_over = [], torch.zeros(len(here), dtype=torch.bool, device=device)
                while len(rows) < longest and not is_over.all():
                    rows.append(next(ids)[:, 0])
                    is_over |= rows[-1] == end_of_text
                for i, row in zip(here, torch.stack(rows, dim=1).tolist()):
                    answers[i] = row[:row.index(end_of_text)] if end_of_text in row else row
    return [answers[i] for i in range(len(prompts))]


def bleu(answers, references):
    """sacrebleu's corpus BLEU of texts, with its signature (Post 2018, arXiv:1804.08771); None where it is missing."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    metric = BLEU()
    return metric.corpus_score(answers, [references]).score, str(metric.get_signature())
