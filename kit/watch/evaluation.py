"""What a model is worth on a split. The model comes in as an argument, the data as rows."""

import math
from contextlib import ExitStack, contextmanager
from itertools import islice

import numpy as np
import torch
from torch.nn import functional as F

from kit.base import devices, ranks

# tokens that are evaluated side by side, where memory allows. On a CPU, with 128 channels and with 384, one thread
# takes as long for each from 768 of them to 8,192, and a third longer at 32,768, which leave its caches; two threads
# wait for each other less often where there are more. On a GPU: an estimate, not measured yet
AT_ONCE_ON_A_CPU, AT_ONCE_ON_A_GPU = 2**12, 2**15


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
        ranks.reshard(model)


def figures(model, rows, split, n, device, dtype):
    """
    {'val/loss', 'val/accuracy'} of the rows of a split, see measure; of a mixture the mean by its shares, and
    'val/loss/NAME' of each of its datasets.
    """
    found = {name: measure(model, part, n and max(1, round(n * share)), device, dtype)
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


def rows_at_once(model, device):
    """
    How many rows are evaluated side by side. This goes by the model and the machine, never by batch_size, so that the
    same weights, split and rows have the same loss in each script. A logit takes up to 10 bytes: in bfloat16, in
    float32, and as a log-probability; together they have a sixteenth of the memory.
    """
    most = AT_ONCE_ON_A_CPU if device.type == 'cpu' else AT_ONCE_ON_A_GPU
    n_tokens = min(most, devices.total_memory(device) / 16 / (10 * model.config.vocab_size))
    return max(1, int(n_tokens / model.config.block_size))


def in_batches(places, model, device):
    """
    Parts of the places (n,) of rows, and how many in each count: for a compiled model, which is to see one shape, the
    last is repeated until its part is full.
    """
    most, is_compiled = rows_at_once(model, device), any(module._compiled_call_impl for module in model.modules())
    for i in range(0, len(places), most):
        here = places[i:i + most]
        yield np.pad(here, (0, most - len(here) if is_compiled else 0), mode='edge'), len(here)


def forward(model, x, y, documents, device, dtype):
    """(logits, loss) without dropout, in the format for measures. dtype: of the training."""
    with evaluating(model), devices.autocast(device, devices.measuring_dtype(dtype, device)):
        return model(x, y, documents)


@torch.no_grad()
def warm_up(model, x, y, documents, device, dtype):
    """Let a compiled model make its graph for evaluations, with these rows (B, T): as many of them as those take."""
    here = torch.arange(rows_at_once(model, device), device=x.device) % len(x)
    forward(model, *(a if a is None else a[here] for a in (x, y, documents)), device, dtype)


@torch.no_grad()
def measure(model, rows, n, device, dtype):
    """
    (mean loss in nats, accuracy of the likeliest token), each over all targets of n evenly spaced rows of one dataset,
    the same each time; n = 0: of all rows. The ranks share the work. No random number is drawn but those that mask
    tokens where they are the targets, and these are the same each time too. On a CPU all is float32, whatever dtype is.
    """
    numbers, skip = rows.readers[0].evenly(n)
    noise = rows.noise(len(numbers), 0) if rows.is_mlm else None
    n_each = -(-len(numbers) // ranks.world_size)  # all make as many passes, as a model in parts needs it
    mine = ranks.rank + ranks.world_size * np.arange(n_each)
    sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    for here, n_here in in_batches(mine, model, device):
        is_more, here = here >= len(numbers), here.clip(max=len(numbers) - 1)
        x, y, documents = rows.fetch(numbers[here], None if noise is None else noise[here])
        counts_not = (np.arange(y.shape[1]) < skip[here, None]) | is_more[:, None]
        counts_not[n_here:] = True
        batch = (devices.send(a, device) for a in (x, np.where(counts_not, np.int64(-1), y), documents))
        sums += batch_sums(model, *batch, device, dtype)
    loss, right, count = ranks.total(sums).tolist()
    return loss / count, right / count


def batch_sums(model, x, y, documents, device, dtype):
    """Of a batch, on the device, (3,): its loss, its right tokens, its targets. Its logits are gone behind it."""
    logits, loss = forward(model, x, y, documents, device, dtype)
    count = (y >= 0).sum()
    total = torch.where(count > 0, loss * count, 0)  # where all targets are counted elsewhere there is no mean
    return torch.stack([total, (logits.argmax(dim=-1) == y).sum(), count])


@torch.no_grad()
def token_losses(model, x, y, documents, device, dtype):
    """The loss of every target y (n, T) of x, without dropout: (n, T) float32, in nats; 0 where nothing counts."""
    losses = []
    for here, n_here in in_batches(np.arange(len(x)), model, device):
        batch = [devices.send(a if a is None else a[here], device) for a in (x, y, documents)]
        logits = forward(model, *batch, device, dtype)[0].float().transpose(1, 2)
        losses.append(F.cross_entropy(logits, batch[1], ignore_index=-1, reduction='none')[:n_here].cpu())
    return torch.cat(losses).numpy()


@torch.no_grad()
def answer(models, prompts, end_of_text, text, longest, batch_size, device, dtype):
    """
    What models (one, or an ensemble) write after prompts, lists of ids: always the likeliest token, up to end_of_text
    or `longest` tokens. text: a tokenizer. Returns lists of ids without end_of_text. batch_size prompts are answered
    side by side, the shortest first. Raises FloatingPointError where the logits are not finite.
    """
    answers, order = {}, sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(devices.autocast(device, dtype))
        for here in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            width = len(prompts[here[-1]])
            idx = torch.tensor([[-1] * (width - len(prompts[i])) + prompts[i] for i in here], device=device)
            ids = models[0].stream(idx, temperature=0, n_ids=text.size, others=models[1:], gaps=text.gaps)
            rows, is_over = [], torch.zeros(len(here), dtype=torch.bool)
            for new in devices.fetched(islice(ids, longest)):
                rows.append(new[:, 0])
                is_over |= rows[-1] == end_of_text
                if is_over.all():
                    break
            rows = torch.stack(rows, dim=1).tolist()
            if any(-1 in row for row in rows):
                raise FloatingPointError('the logits of this model are not finite')
            answers |= {i: row[:row.index(end_of_text)] if end_of_text in row else row for i, row in zip(here, rows)}
    return [answers[i] for i in range(len(prompts))]


def bleu(answers, references):
    """sacrebleu's corpus BLEU of texts, with its signature (Post 2018, arXiv:1804.08771); None where it is missing."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    metric = BLEU()
    return metric.corpus_score(answers, [references]).score, str(metric.get_signature())
