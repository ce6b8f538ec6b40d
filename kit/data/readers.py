"""
A dataset, or a mixture of several, as rows: windows of the text, packed documents, or pairs of a prompt and a response.

    data, meta = readers.open(config)            # {'train': Rows, 'val': Rows, ...}
    rows = data['train'].draw(64, seed, step, 'random')
    tokens = data['train'].read(rows)
    x, y, documents = data['train'].mark(tokens[:, :-1], tokens[:, 1:], rows)

A reader knows one split of one dataset. Its rows have numbers, and each reader offers what Windows does.
"""

from functools import cached_property, lru_cache

import numpy as np

from kit.base import ranks
from kit.base.errors import fail
from kit.data import batches, tokens


class Windows:
    """Rows that begin anywhere in the text and have block_size tokens. The number of a row is where it begins."""

    def __init__(self, data, block_size):
        self.data, self.block_size = data, block_size
        self.n_tokens = len(data)  # that an epoch has
        self.n_numbers = len(data) - block_size
        if isinstance(data, np.ndarray):
            self.windows = np.lib.stride_tricks.sliding_window_view(np.asarray(data), block_size + 1)

    def rows_per_epoch(self, sampling):
        return batches.rows_per_epoch(len(self.data), self.block_size, sampling)

    def draw(self, rows, seed, step, sampling, rewinds, first, number, usual):
        """The (rows,) numbers of a step's rows, see batches.window_starts. usual: the number of rows in most steps."""
        return batches.window_starts(len(self.data), self.block_size, rows, seed, step, sampling,
                                     rewinds, first, number)

    def evenly(self, rows):
        """Rows for an evaluation, the same each time: (numbers, how many targets at the begin of each count not)."""
        return batches.evaluation_windows(len(self.data), self.block_size, rows)

    def read(self, rows):
        """The tokens of these rows, (n, T + 1): all but the last are x, all but the first are y, see mark."""
        if isinstance(self.data, np.ndarray):
            return self.windows[rows]  # copied in one strided gather
        return self.data[rows[:, None] + np.arange(self.block_size + 1)]

    def mark(self, x, y, rows):
        """
        What is special in x and y, (n, T) each, of these rows: y is -1 where nothing is to be learned. And documents
        (n, T), numbers that differ where attention must not pass, or None.
        """
        return x, y, None

    def lengths(self, rows):
        """How many tokens x has in each row, without padding."""
        return np.full(len(rows), self.block_size)

    def count(self, rows):
        """How many targets y has in all these rows."""
        return len(rows) * self.block_size

    def targets(self):
        """The targets of an epoch: ids with a length and slices, which may lie on the disk."""
        return self.data[1:] if isinstance(self.data, np.ndarray) else self.data.without_first()

    def where(self, row):
        """Where the text of a row is."""
        return f'tokens {row:,} to {row + self.block_size:,}'


class Listed:
    """What readers of a list of rows share: their number is the place in the list."""

    def rows_per_epoch(self, sampling):
        return self.n_numbers

    def draw(self, rows, seed, step, sampling, rewinds, first, number, usual):
        places = np.arange(first, first + rows)
        found = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(places // self.n_numbers).tolist():
            here = places // self.n_numbers == epoch
            found[here] = self.order(epoch, seed, sampling, rewinds, number, usual)[places[here] % self.n_numbers]
        return found

    @lru_cache(maxsize=8)  # noqa: B019  (a reader lives as long as its script)
    def order(self, epoch, seed, sampling, rewinds, number, usual):
        """The rows of an epoch, (n,). random: with replacement."""
        n = self.n_numbers
        draw = batches.generator(seed, epoch, 1, rewinds, number)
        if sampling == 'sequential':
            return np.roll(np.arange(n), -rewinds * (n // 2))
        order = draw.permutation(n) if sampling == 'shuffle' else draw.integers(n, size=n)
        return self.arrange(order, epoch, usual, draw)

    def arrange(self, order, epoch, usual, draw):
        return order

    def evenly(self, rows):
        n = self.n_numbers
        numbers = np.arange(rows) * n // rows if 0 < rows < n else np.arange(n)
        return numbers, np.zeros_like(numbers)


class Packed(Listed):
    """
    Rows of block_size tokens, packed with whole documents, see batches.pack. A document is what ends with end_of_text;
    that of the one before it is its first input, so each token is a target, and a row has no gap.
    """

    def __init__(self, data, block_size, end_of_text, is_apart):
        self.data, self.block_size, self.end_of_text, self.is_apart = data, block_size, end_of_text, is_apart
        ends = batches.document_ends(data, end_of_text)
        self.starts, self.piece_lengths, self.row_ends = batches.pack(ends, block_size)
        self.n_numbers, self.n_tokens, self.n_documents = len(self.row_ends), len(data), len(ends)
        begins = np.isin(self.starts, np.concatenate([[0], ends[:-1]]))
        self.cropped = self.piece_lengths[~begins].sum() / len(data)

    def pieces(self, rows):
        """Which pieces make these rows, one after the other, and how many each row has."""
        last = self.row_ends[rows]
        first = np.where(rows > 0, self.row_ends[rows - 1], 0)
        counts = last - first
        return np.repeat(last - np.cumsum(counts), counts) + np.arange(counts.sum()), counts

    def spans(self, rows):
        """
        The pieces of these rows, one after the other: (starts, lengths) in the text. And how many tokens each row has:
        where these are fewer than block_size, as in the last row of the list, one more piece fills it up.
        """
        pieces, counts = self.pieces(rows)
        starts, lengths, behind = self.starts[pieces], self.piece_lengths[pieces], np.cumsum(counts)
        sums = np.add.reduceat(lengths, behind - counts)
        short = np.flatnonzero(sums < self.block_size)
        if len(short):
            starts = np.insert(starts, behind[short], 0)
            lengths = np.insert(lengths, behind[short], self.block_size - sums[short])
        return starts, lengths, sums

    def before(self, places):
        """The tokens before these places; before the text an end_of_text, as before every document."""
        return np.where(places > 0, self.data[np.maximum(places - 1, 0)], self.end_of_text)

    def read(self, rows):
        starts, lengths, _ = self.spans(rows)
        n, T = len(rows), self.block_size
        places = np.repeat(starts + lengths - np.cumsum(lengths), lengths) + np.arange(n * T)
        tokens = np.empty((n, T + 1), np.int64)
        tokens[:, 0] = self.before(places[::T])
        tokens[:, 1:] = self.data[np.minimum(places, len(self.data) - 1)].reshape(n, T)
        return tokens

    def mark(self, x, y, rows):
        starts, lengths, sums = self.spans(rows)
        x = x.copy()
        x.reshape(-1)[np.cumsum(lengths) - lengths] = self.before(starts)  # not what stands before it in the row
        if (sums < self.block_size).any():
            y = np.where(np.arange(self.block_size) < sums[:, None], y, -1)
        return x, y, np.repeat(np.arange(len(starts)), lengths).reshape(y.shape) if self.is_apart else None

    def lengths(self, rows):
        pieces, counts = self.pieces(rows)
        return np.add.reduceat(self.piece_lengths[pieces], np.cumsum(counts) - counts)

    def count(self, rows):
        return int(self.lengths(rows).sum())

    def targets(self):
        return self.data

    def where(self, row):
        pieces, _ = self.pieces(np.array([row]))
        return f'{len(pieces)} pieces, the first from token {self.starts[pieces[0]]:,} on'


class Padded(Listed):
    """
    Rows of a prompt, end_of_text, a response, end_of_text, as wide as the longest of those fetched together. The
    targets are the response and the end_of_text behind it.

    places: (n, 3), see tokens.read_rows. too_long: what becomes of a row that is longer than block_size: cut takes the
    begin of its prompt away, and of a response that is longer alone the end; drop leaves the row out. multiple: the
    width is the next multiple of it, or block_size where that is less.
    """

    def __init__(self, data, block_size, places, end_of_text, too_long, multiple=1):
        self.data, self.block_size, self.end_of_text, self.multiple = data, block_size, end_of_text, multiple
        begin, target, end = np.asarray(places).T
        is_long = end - begin - 1 > block_size
        self.n_long, self.longest = int(is_long.sum()), int((end - begin - 1).argmax())
        if too_long == 'drop':
            begin, target, end = begin[~is_long], target[~is_long], end[~is_long]
        else:
            begin = np.minimum(np.maximum(begin, end - 1 - block_size), target - 1)
            end = np.minimum(end, begin + 1 + block_size)
        self.begin, self.target, self.end = begin, target, end
        self.n_numbers, self.n_tokens = len(begin), int((end - begin - 1).sum())

    def arrange(self, order, epoch, usual, draw):
        return batches.by_length(order, self.end - self.begin, usual, epoch * self.n_numbers, draw)

    def evenly(self, rows):
        numbers, skip = super().evenly(rows)
        return numbers[np.argsort(self.lengths(numbers), kind='stable')], skip

    def read(self, rows):
        begin, end = self.begin[rows, None], self.end[rows, None]
        width = min(-(-self.lengths(rows).max() // self.multiple) * self.multiple, self.block_size)
        places = begin + np.arange(width + 1)  # (n, T + 1)
        return self.data[np.minimum(places, end - 1)].astype(np.int64)  # what lies beyond repeats end_of_text

    def mark(self, x, y, rows):
        places = self.begin[rows, None] + 1 + np.arange(y.shape[1])  # of the targets
        counts = (places >= self.target[rows, None]) & (places < self.end[rows, None])
        return x, np.where(counts, y, -1), None

    def lengths(self, rows):
        return self.end[rows] - self.begin[rows] - 1

    def count(self, rows):
        return int((self.end[rows] - self.target[rows]).sum())

    def targets(self):
        return np.concatenate([self.data[slice(*place)] for place in zip(self.target.tolist(), self.end.tolist())])

    def where(self, row):
        return f'tokens {self.begin[row]:,} to {self.end[row] - 1:,}, the response from {self.target[row]:,} on'

    def pair(self, row):
        """The ids of the prompt, end_of_text included, and those of the response without its own."""
        begin, target, end = self.begin[row], self.target[row], self.end[row]
        return self.data[begin:target].tolist(), [i for i in self.data[target:end].tolist() if i != self.end_of_text]


class Rows:
    """
    The rows of a split: of one reader, or of several in fixed shares. The numbers of a mixture's rows are those of its
    first reader, then those of the next, and so on.

    names: of the datasets; shares: of each, they sum to 1; mask_prob: share of the tokens that are corrupted; mask: the
    id that stands for a hidden one; is_mlm: the hidden tokens are the targets.
    """

    def __init__(self, names, readers, shares, mask_prob=0.0, mask=None, is_mlm=False):
        self.names, self.readers, self.shares = names, readers, shares
        self.mask_prob, self.mask, self.is_mlm = mask_prob, mask, is_mlm
        self.block_size = readers[0].block_size
        self.firsts = np.cumsum([0] + [reader.n_numbers for reader in readers[:-1]])  # number of each reader's row 0
        self.n_tokens = sum(reader.n_tokens for reader in readers)

    @property
    def mean_length(self):
        """Tokens in a row, without padding, on average."""
        if isinstance(self.readers[0], Padded):
            return sum(share * r.n_tokens / r.n_numbers for share, r in zip(self.shares, self.readers))
        return self.block_size

    def unigram_entropy(self):
        """The loss, in nats a target, of who knows how frequent each token is in its dataset, and nothing else."""
        return sum(share * batches.unigram_entropy(r.targets()) for share, r in zip(self.shares, self.readers))

    @cached_property
    def parts(self):
        """{name: Rows} of each dataset alone."""
        return {name: Rows([name], [reader], [1.0], self.mask_prob, self.mask, self.is_mlm)
                for name, reader in zip(self.names, self.readers)}

    def rows_per_epoch(self, sampling):
        """How many rows make an epoch; of a mixture, as many as its datasets have together."""
        return sum(reader.rows_per_epoch(sampling) for reader in self.readers)

    def draw(self, rows, seed, step, sampling, rewinds=0):
        """
        The numbers of a step's rows, of all micro-steps and ranks, (rows,): a function of the arguments alone (promise
        1). Rows that differ in length come sorted by it, so that those of a micro-step are alike.
        """
        before = batches.apportion(step * rows, self.shares)
        after = batches.apportion((step + 1) * rows, self.shares)
        found = [first + reader.draw(until - since, seed, step, sampling, rewinds, since, number,
                                     max(1, round(rows * share)))
                 for number, (reader, first, since, until, share) in enumerate(
                     zip(self.readers, self.firsts, before, after, self.shares)) if until > since]
        found = np.concatenate(found)
        return found[np.argsort(self.lengths(found), kind='stable')] if isinstance(self.readers[0], Padded) else found

    @lru_cache(maxsize=1)  # noqa: B019  (the micro-steps of a step share them)
    def of_step(self, rows, seed, step, sampling, rewinds=0):
        """All rows of a step, which its micro-steps share: (their numbers, their noise, how many targets they have)."""
        numbers, noise = self.draw(rows, seed, step, sampling, rewinds), self.noise(rows, seed, step, rewinds)
        return numbers, noise, self.count(numbers, noise)

    def noise(self, rows, *key):
        """What decides which tokens of a step's rows are corrupted; None where none are."""
        return batches.noise(rows, self.block_size, *key) if self.mask_prob else None

    def read(self, rows):
        """The tokens of these rows, (n, T + 1): all but the last are x, all but the first are y, see mark."""
        if len(self.readers) == 1:
            return self.readers[0].read(rows)
        found = [(here, reader.read(own)) for here, reader, own in self.split(rows)]
        tokens = np.zeros((len(rows), max(part.shape[1] for _, part in found)), np.int64)
        for here, part in found:
            tokens[here, :part.shape[1]] = part
        return tokens

    def mark(self, x, y, rows, noise=None):
        """
        What is special in x and y, (n, T) each, of these rows: y is -1 where nothing is to be learned. noise: (n,
        block_size), their part of what noise() gave: then tokens of x are corrupted, and with is_mlm y holds the hidden
        ones, at their own places. Returns x, y and documents (n, T), numbers that differ where attention must not pass,
        or None.
        """
        if len(self.readers) == 1:
            x, y, documents = self.readers[0].mark(x, y, rows)
        else:
            x, y, documents = self.mark_mixed(x, y, rows)
        if noise is None:
            return x, y, documents
        chosen = batches.is_corrupted(noise[:, :x.shape[1]], self.lengths(rows), self.mask_prob)
        return (batches.corrupt(x, noise[:, :x.shape[1]], chosen, self.mask_prob, self.mask, self.mask),
                np.where(chosen, x, np.int64(-1)) if self.is_mlm else y, documents)

    def mark_mixed(self, x, y, rows):
        x, y, documents = x.copy(), y.copy(), None
        for here, reader, own in self.split(rows):
            x[here], y[here], documents_here = reader.mark(x[here], y[here], own)
            if documents_here is not None:
                documents = np.zeros_like(x) if documents is None else documents
                documents[here] = documents_here
        return x, y, documents

    def fetch(self, rows, noise=None):
        """x, y and documents of these rows, as get_batch of train.py puts them together."""
        tokens = self.read(rows)
        return self.mark(tokens[:, :-1], tokens[:, 1:], rows, noise)

    def split(self, rows):
        """[(which of the rows, their reader, their numbers there)]"""
        if len(self.readers) == 1:
            return [(slice(None), self.readers[0], rows)]
        which = np.searchsorted(self.firsts, rows, side='right') - 1
        return [(which == i, self.readers[i], rows[which == i] - self.firsts[i]) for i in np.unique(which)]

    def lengths(self, rows):
        found = np.empty(len(rows), np.int64)
        for here, reader, own in self.split(rows):
            found[here] = reader.lengths(own)
        return found

    def count(self, rows, noise=None):
        """How many targets these rows have."""
        if self.is_mlm:
            return int(batches.is_corrupted(noise, self.lengths(rows), self.mask_prob).sum())
        return sum(reader.count(own) for _, reader, own in self.split(rows))

    def where(self, row):
        """Where the text of a row is."""
        (_, reader, own), = self.split(np.array([row]))
        name = '' if len(self.readers) == 1 else f'{self.names[self.readers.index(reader)]}, '
        return name + reader.where(int(own[0]))


# ---------------------------------------------------------------------------------------------------------------------
# datasets


def parse(dataset):
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}, the shares summed up to 1; a name without a number counts as 1."""
    weights = {}
    for part in dataset.split(','):
        name, _, weight = part.strip().partition(':')
        if name in weights:
            fail(f'dataset = {dataset!r}: {name} stands there twice')
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0.0
        if not name or not 0 < weights[name] < 1e100:
            fail(f'dataset = {dataset!r}: a mixture is NAME:SHARE,NAME:SHARE with shares above 0, such as a:0.7,b:0.3')
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    if min(shares.values()) < 1e-9:
        fail(f'dataset = {dataset!r}: {min(shares, key=shares.get)} has less than a billionth of the rows; take shares '
             'such as a:0.7,b:0.3')
    return shares


def open(settings, row_multiple=1):
    """
    ({split: Rows}, meta) of what the settings of train.py name; those that a checkpoint of an older version, or of
    nanoGPT, does not have count as their defaults. meta['text'] tells the text from any other, whatever its name. A
    dataset that will not do ends the script with the reason. row_multiple: of how many tokens padded rows are a
    multiple, see Padded; it changes no target.
    """
    s = {'batch_mode': 'windows', 'document_attention': True, 'too_long': 'cut', 'objective': 'causal',
         'mask_prob': 0.0} | settings
    shares, found = parse(s['dataset']), {}
    for name in shares:
        folder = find(name)
        found[name] = (folder, *tokens.read_dataset(folder, s['block_size'] if s['batch_mode'] == 'windows' else 1))
        if found[name][2] is tokens.GPT2:
            print(f"{folder} has no meta file: its ids are taken for GPT-2's")
    texts = {name: tokens.fingerprint(folder, meta) for name, (folder, _, meta) in found.items()}
    ranks.agree('data', texts)
    first, (_, _, meta) = next(iter(found.items()))
    for name, (_, _, other) in found.items():
        if not tokens.is_same_tokenizer(other['tokenizer'], meta['tokenizer']):
            fail(f'dataset = {s["dataset"]!r}: {first} and {name} have different tokenizers; prepare both with the '
                 'same, such as gpt2 or byte')
    common = [split for split in ('train', 'val', 'test') if all(split in splits for _, splits, _ in found.values())]
    return {split: Rows(list(found), [reader(name, folder, split, splits[split], meta_here, s, row_multiple)
                                      for name, (folder, splits, meta_here) in found.items()],
                        list(shares.values()), s['mask_prob'], meta['vocab_size'], s['objective'] == 'mlm')
            for split in common}, meta | {'text': text_of(list(texts.values()), shares)}


def text_of(texts, shares):
    """The fingerprint of a dataset, or of a mixture, of those of its parts."""
    if len(texts) > 1:
        texts = [f'{share} {text}' for share, text in sorted(zip(shares.values(), texts))]
    return ', '.join(texts)


def find(name):
    """The folder of a dataset. One that is missing is made by rank 0, while the others wait, or it ends the script."""
    if ranks.is_main and not tokens.exists(tokens.dataset_folder(name)):
        from kit.data import corpora  # with all that makes datasets, which a launch seldom needs
        corpora.prepare_missing(name)
    ranks.wait()
    return tokens.dataset_folder(name)


def reader(name, folder, split, data, meta, s, row_multiple):
    """One split of one dataset as batch_mode says. What was cut to fit is printed."""
    mode, block_size, end_of_text = s['batch_mode'], s['block_size'], meta.get('end_of_text')
    if mode == 'windows':
        return Windows(data, block_size)
    if mode in ('packed', 'padded') and end_of_text is None:
        fail(f'batch_mode = {mode!r}: {name} has no end-of-text id between its documents; prepare it again from a '
             'folder of files or from .jsonl rows, or take --batch_mode=windows')
    if mode == 'packed':
        packed = Packed(data, block_size, end_of_text, s['document_attention'])
        print(f'packed: {split} of {name} has {packed.n_documents:,} documents in {packed.n_numbers:,} rows; '
              f'{packed.cropped:.2%} of its tokens are cropped, that is cut off from the begin of their document')
        return packed
    if mode != 'padded':
        fail(f'batch_mode = {mode!r}: kit/data/readers.py has no such mode')
    places = tokens.read_rows(folder, split, len(data), meta)
    if places is None:
        fail(f'batch_mode = {mode!r}: {name} holds no pairs (no {split}.rows.npy); python prepare.py --input=FILE.tsv '
             f'--dataset=NAME makes them, and --batch_mode=windows takes {name} as it is')
    padded = Padded(data, block_size, places, end_of_text, s['too_long'], row_multiple)
    if padded.n_long:
        done = 'their prompts are cut from the left' if s['too_long'] == 'cut' else 'they are dropped'
        length = places[padded.longest][2] - places[padded.longest][0] - 1
        print(f'padded: {padded.n_long:,} of the {len(places):,} pairs in {split} of {name} are longer than block_size '
              f'= {block_size} (the longest, pair {padded.longest:,}, has {length:,} tokens); {done} '
              f'(--too_long={s["too_long"]})')
    if not padded.n_numbers:
        fail(f'too_long = {s["too_long"]!r}: no pair in {split} of {name} fits block_size = {block_size}; take a '
             'larger one, or --too_long=cut')
    return padded
