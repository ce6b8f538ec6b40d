"""Shards, packed documents, pairs, masks and mixtures: against brute force, and through the real train.py."""

import gzip
import io
import json
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from conftest import TINY, fetch, losses, records, small_run, some_text
from hypothesis import given, settings
from hypothesis import strategies as st

import model as gpt
from kit.data import batches, bins, readers, tokens
from kit.watch import evaluation

EOT = 256  # of the byte tokenizer
CPU = torch.device('cpu')


def write_dataset(folder, splits, rows=None, **changes):
    """A dataset folder of bytes, {split: ids}, and {split: rows} where it holds pairs."""
    folder.mkdir(parents=True)
    files = {}
    for split, ids in splits.items():
        np.array(ids, '<u2').tofile(folder / f'{split}.bin')
        files[split] = {'tokens': len(ids), 'sha256': tokens.sha256(folder / f'{split}.bin')}
        if rows:
            np.save(folder / f'{split}.rows.npy', np.array(rows[split], np.int64))
    meta = {'format': 1, 'dtype': 'uint16', 'vocab_size': 257, 'tokenizer': {'kind': 'byte'}, 'end_of_text': EOT,
            'files': files, 'documents': {split: 20 for split in splits}} | changes
    (folder / 'meta.json').write_text(json.dumps(meta))


def documents(n, seed, longest=30):
    """Texts of one to `longest` bytes, each with EOT behind it."""
    rng, text = np.random.default_rng(seed), some_text(seed=seed)
    starts, lengths = rng.integers(10_000, size=n), rng.integers(1, longest + 1, size=n)
    return [list(text[s:s + length].encode()) + [EOT] for s, length in zip(starts, lengths)]


def pairs(n, seed):
    """(ids, rows): words and the same words the other way round."""
    rng, words = np.random.default_rng(seed), some_text(seed=1).replace('.', ' ').split()
    ids, rows = [], []
    for _ in range(n):
        chosen = [words[i] for i in rng.integers(len(words), size=rng.integers(1, 4))]
        start = len(ids)
        ids += [*' '.join(chosen).encode(), EOT]
        target = len(ids)
        ids += [*' '.join(chosen[::-1]).encode(), EOT]
        rows.append((start, target, len(ids)))
    return ids, rows


@pytest.fixture
def byte_sets(tiny):
    """data/docs, data/other (documents) and data/pairs in the folder where the scripts run."""
    for name, seed in ('docs', 0), ('other', 10):
        write_dataset(tiny / 'data' / name, {split: sum(documents(n, seed + i), []) for i, (split, n) in enumerate(
            [('train', 200), ('val', 40), ('test', 40)])})
    made = {split: pairs(n, i) for i, (split, n) in enumerate([('train', 120), ('val', 30), ('test', 30)])}
    write_dataset(tiny / 'data/pairs', {split: ids for split, (ids, _) in made.items()},
                  {split: rows for split, (_, rows) in made.items()}, pairs=True)
    return tiny


@pytest.fixture
def small():
    torch.manual_seed(0)
    return lambda **kwargs: gpt.GPT(gpt.GPTConfig(**dict(block_size=32, vocab_size=258, n_layer=2, n_head=2, n_embd=32,
                                                         bias=False) | kwargs))


MODES = {
    'windows': ['--dataset=docs'],
    'packed': ['--dataset=docs', '--batch_mode=packed'],
    'padded': ['--dataset=pairs', '--batch_mode=padded', '--block_size=48'],
    'masked': ['--dataset=docs', '--mask_prob=0.3'],
    'mlm': ['--dataset=docs', '--objective=mlm'],
    'packed mlm': ['--dataset=docs', '--objective=mlm', '--batch_mode=packed'],
    'mixture': ['--dataset=docs:0.7,other:0.3', '--sampling=shuffle'],
    'packed mixture': ['--dataset=docs:0.7,other:0.3', '--batch_mode=packed', '--sampling=shuffle'],
}

# ---------------------------------------------------------------------------------------------------------------------
# shards


def test_shards_are_one_array():
    rng = np.random.default_rng(0)
    parts = [rng.integers(100, size=n).astype(np.uint16) for n in (50, 1, 30, 19)]
    whole, shards = np.concatenate(parts), tokens.Shards(parts)
    assert len(shards) == 100 and shards.dtype == np.uint16
    for a, b in (0, 100), (0, 7), (45, 60), (49, 52), (90, 300), (70, 70), (None, None), (5, None):
        assert np.array_equal(shards[a:b], whole[a:b])
    assert np.array_equal(shards.without_first()[:], whole[1:])
    places = rng.integers(100, size=(9, 5))
    assert np.array_equal(shards[places], whole[places]) and shards[99] == whole[99]
    starts = np.arange(84)
    mine, theirs = (fetch(readers.Windows(data, 16), starts)[:2] for data in (shards, whole))
    assert np.array_equal(mine, theirs)
    assert np.array_equal(batches.document_ends(shards, 3, chunk=8), batches.document_ends(whole, 3))


def test_a_sharded_dataset_trains_like_its_whole(train, tiny):
    whole = np.fromfile(tiny / 'data/tiny/train.bin', '<u2')
    one = losses(train('--max_iters=5', '--sampling=shuffle', '--out_dir=one'))
    (tiny / 'data/tiny/train.bin').unlink()
    meta = json.loads((tiny / 'data/tiny/meta.json').read_text())
    del meta['files']['train']
    for i, part in enumerate(np.split(whole, [5000, 12_345])):
        path = tiny / f'data/tiny/train_{i:06d}.bin'
        part.tofile(path)
        meta['files'][path.stem] = {'tokens': len(part), 'sha256': tokens.sha256(path)}
    (tiny / 'data/tiny/meta.json').write_text(json.dumps(meta))
    assert losses(train('--max_iters=5', '--sampling=shuffle', '--out_dir=two')) == one
    (tiny / 'data/tiny/train_000001.bin').unlink()
    result = train('--out_dir=three')
    assert result.status == 2 and 'train_000001.bin is missing' in result.err and result.err.count('\n') == 1


def shard_of_llm_c(path, ids, magic=20240520, version=1, n=None, dtype='<u2'):
    n = len(ids) if n is None else n
    path.write_bytes(struct.pack('<256i', magic, version, n, *[0] * 253) + np.array(ids, dtype).tobytes())


def test_shards_of_llm_c_are_read_as_they_are(run, tiny):
    """Their header is skipped, their names are known, and without any meta the ids are GPT-2's."""
    folder = tiny / 'data/fineweb'
    folder.mkdir()
    ids = np.random.default_rng(0).integers(50257, size=900)
    for name, part in zip(('train_000001', 'train_000002', 'val_000000'), np.split(ids, [400, 700])):
        shard_of_llm_c(folder / f'fineweb_{name}.bin', part)
    data, meta = tokens.read_dataset(folder)
    assert np.array_equal(data['train'][:], ids[:700]) and np.array_equal(data['val'][:], ids[700:])
    assert meta['vocab_size'] == 50257 and 'test' not in data
    result = run('train.py', '--dataset=fineweb', *TINY, '--max_iters=1', '--n_embd=8')
    assert result.status == 0 and "fineweb has no meta file: its ids are taken for GPT-2's" in result.out, result.err
    path = folder / 'fineweb_train_000002.bin'
    path.write_bytes(path.read_bytes()[:-10])
    result = run('train.py', '--dataset=fineweb', *TINY)
    assert result.status == 2 and 'its header speaks of 300 tokens' in result.err and result.err.count('\n') == 1


LLAMA = dict(magic=20240801, version=7, dtype='<u4')
FAR = [128_000, 70_000, 5, 6] * 20
IDS_32 = {'vocab_size': 128_256, 'dtype': 'uint32', 'tokenizer': {'kind': 'ids', 'size': 128_256}}


@pytest.fixture
def refused(tmp_path, capsys):
    """refused() -> the one line that reading tmp_path as a dataset ends with."""
    def read():
        with pytest.raises(SystemExit) as end:
            tokens.read_dataset(tmp_path)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count('\n') == 1
        return err
    return read


def test_shards_of_llama_3_are_read_where_a_meta_json_says_so(tmp_path, refused):
    for split in 'train', 'val':
        shard_of_llm_c(tmp_path / f'x_{split}_0.bin', FAR, **LLAMA)
    line = refused()
    assert 'x_train_0.bin' in line and 'Llama 3' in line
    remedy = json.loads(line[line.index('{'):])
    assert remedy == IDS_32
    (tmp_path / 'meta.json').write_text(json.dumps(remedy))
    data, meta = tokens.read_dataset(tmp_path)
    assert data['train'].tolist() == FAR
    assert tokens.decode(tokens.tokenizer(meta['tokenizer']), FAR[:2]) == ' 128000 70000'
    shard_of_llm_c(tmp_path / 'x_train_1.bin', [7] * 50)  # one of GPT-2 beside it
    shard_of_llm_c(tmp_path / 'x_train_2.bin', FAR, **LLAMA)
    shards = tokens.read_dataset(tmp_path)[0]['train']
    assert shards[:].tolist() == shards[np.arange(len(shards))].tolist() == FAR + [7] * 50 + FAR


@pytest.mark.parametrize('changes, named', [
    (dict(version=2), 'version 2'),
    (dict(n=-5), '-5 tokens'),
    (dict(n=0), '0 tokens'),
    (dict(n=2**31 - 1), '2,147,483,647 tokens'),
    (LLAMA | dict(version=1), 'version 1'),
])
def test_shards_of_other_kinds(tmp_path, refused, changes, named):
    shard_of_llm_c(tmp_path / 'x_train_0.bin', FAR if 'dtype' in changes else [5] * 90, **changes)
    shard_of_llm_c(tmp_path / 'x_val_0.bin', [5] * 90)
    line = refused()
    assert 'x_train_0.bin' in line and named in line


@pytest.mark.parametrize('kind', ['uint32', 'int64'])
def test_ids_of_32_bits_are_not_taken_for_16(tmp_path, refused, kind):
    ids = np.random.default_rng(0).integers(50257, size=500)
    for split in 'train', 'val':
        ids.astype(kind).tofile(tmp_path / f'{split}.bin')
    line = refused()
    assert 'train.bin' in line and '"dtype": "uint32"' in line
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 50257}))  # nanoGPT would read them as 16 bits too
    assert 'train.bin' in refused()
    (tmp_path / 'meta.json').write_text(line[line.index('{'):])
    if kind == 'uint32':
        assert tokens.read_dataset(tmp_path)[0]['train'].tolist() == ids.tolist()
    ids[ids == 0] = 1
    for split in 'train', 'val':
        np.where(np.arange(500) % 2, 0, ids).astype('<u2').tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'meta.json').write_text(json.dumps(tokens.GPT2 | {'dtype': 'uint16'}))  # who says so is believed
    assert tokens.read_dataset(tmp_path)[0]['train'][1] == 0


@pytest.mark.parametrize('content, named', [
    (lambda file: np.save(file, np.arange(500, dtype=np.uint16)), '.npy'),
    (lambda file: torch.save({'model': torch.ones(500)}, file), 'zip'),
    (lambda file: file.write(gzip.compress(os.urandom(500))), '.gz'),
    (lambda file: file.write(('To be, or not to b\u00e9: \n\t' * 500).encode()), 'a text'),
    (lambda file: file.write(struct.pack('<3i', 20240520, 1, 900)), 'cut off within its header'),
    (lambda file: file.write(b'12345'), 'no whole number'),
])
def test_files_that_are_no_ids(tmp_path, refused, content, named):
    np.full(500, 7, '<u2').tofile(tmp_path / 'val.bin')
    with open(tmp_path / 'train.bin', 'wb') as file:
        content(file)
    line = refused()
    assert 'train.bin' in line and named in line


def test_a_folder_is_no_file_of_ids(tmp_path, refused):
    (tmp_path / 'train.bin').mkdir()
    assert 'train.bin' in refused()


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='it takes /proc')
def test_memory_stays_flat_over_a_large_memory_map(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(400_000_000)  # a hole, so it takes no space
    data = np.memmap(tmp_path / 'train.bin', dtype='<u2', mode='r')
    rows = readers.Rows(['hole'], [readers.Windows(data, 256)], [1.0])

    def anonymous():
        with open('/proc/self/status') as status:
            return next(int(line.split()[1]) for line in status if line.startswith('RssAnon'))
    for step in range(2200):
        rows.fetch(rows.draw(64, 0, step, 'random'))
        if step == 200:
            before = anonymous()
    assert anonymous() - before < 4096  # kB; one batch of 2,000 kept would be 65 MB


# ---------------------------------------------------------------------------------------------------------------------
# meta files and tokenizers


@pytest.mark.parametrize('text', [
    '[' * 100_000, '[]', '5', 'null', '', '{', '\x00', '{"vocab_size": ' + '9' * 5000 + '}', b'\xff\xfe{'])
def test_a_meta_json_that_is_none(tmp_path, refused, text):
    np.full(500, 7, '<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    assert 'meta.json is damaged or foreign' in refused()


def test_a_name_that_no_folder_can_have(tmp_path):
    """As of the dataset in a checkpoint: there is none."""
    assert tokens.read_meta(tmp_path / ('x' * 300)) is tokens.GPT2 and not tokens.exists(tmp_path / ('x' * 300))


def with_gaps():
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b'ab': 260}
    return tokens.describe_bpe(tiktoken.Encoding('gap', pat_str=r'\S+|\s+', mergeable_ranks=ranks,
                                                 special_tokens={tokens.END: 300, '<|other|>': 302}))


@pytest.mark.parametrize('changes, word', [
    ({'vocab_size': 0}, 'vocab_size is 0'), ({'vocab_size': '257'}, "is '257'"), ({'vocab_size': True}, 'is True'),
    ({'vocab_size': 10**12}, 'vocab_size is 1000'), ({'vocab_size': 257.0}, 'is 257.0'), ({'vocab_size': 5}, '5 ids'),
    ({'format': [1]}, 'format [1]'), ({'dtype': 'float32'}, "'float32'"), ({'dtype': None}, 'dtype is None'),
    ({'dtype': {}}, 'dtype is {}'), ({'files': []}, 'files is []'), ({'files': {'train': 5}}, 'a dict should'),
    ({'files': {'train': {'tokens': 'x', 'sha256': ''}}}, "tokens is 'x'"), ({'files': {'train': {}}}, "'tokens'"),
    ({'documents': 5}, 'documents is 5'), ({'pairs': 'x'}, "pairs is 'x'"), ({'separator': 5}, 'separator is 5'),
    ({'end_of_text': -1}, 'end_of_text is -1'), ({'end_of_text': 257}, 'is 257'), ({'end_of_text': '256'}, "'256'"),
    ({'end_of_text': True}, 'end_of_text is True'), ({'documents': {'train': 5}, 'end_of_text': None}, 'no end_of'),
    ({'tokenizer': 'gpt2'}, "tokenizer is 'gpt2'"), ({'tokenizer': {}}, "'kind'"), ({'tokenizer': None}, 'is None'),
    ({'tokenizer': {'kind': 'x'}}, "of kind 'x'"), ({'tokenizer': {'kind': ['byte']}}, "kind is ['byte']"),
    ({'tokenizer': {'kind': 'ids'}}, "'size'"), ({'tokenizer': {'kind': 'ids', 'size': '5'}}, "size is '5'"),
    ({'tokenizer': {'kind': 'ids', 'size': 10**9}}, 'beyond the vocabulary of 257'),
    ({'tokenizer': {'kind': 'char'}}, "'chars'"), ({'tokenizer': {'kind': 'char', 'chars': 'a' * 257}}, 'chars is'),
    ({'tokenizer': {'kind': 'char', 'chars': [*'a' * 256, 5]}}, 'item 256'),
    ({'tokenizer': {'kind': 'char', 'chars': [['a']] * 257}}, 'list found'),
    ({'tokenizer': {'kind': 'char', 'chars': ['a']}}, '1 ids, fewer than'),
    ({'tokenizer': {'kind': 'char', 'chars': [''] * 257}}, 'none of its ids has a token'),
    ({'tokenizer': {'kind': 'word', 'words': [5] * 257}}, "'int'"),
    ({'tokenizer': {'kind': 'word', 'words': []}}, 'none of its ids'),
    ({'tokenizer': {'kind': 'word', 'words': [''] * 257}}, 'none of its ids'),
    ({'tokenizer': {'kind': 'bpe'}}, 'has no name'), ({'tokenizer': {'kind': 'bpe', 'name': ''}}, 'has no name'),
    ({'tokenizer': {'kind': 'bpe', 'name': 5}}, 'name is 5'),
    ({'tokenizer': {'kind': 'bpe', 'name': 'x', 'ranks': '%%%'}}, "'pattern'"),
    ({'tokenizer': with_gaps() | {'ranks': '%%%'}, 'vocab_size': 303}, 'base64'),
    ({'tokenizer': with_gaps() | {'ranks': 'YQ=='}, 'vocab_size': 303}, 'no token for the byte 0'),
    ({'tokenizer': with_gaps() | {'ranks': 5}, 'vocab_size': 303}, 'ranks is 5'),
    ({'tokenizer': with_gaps() | {'special': {tokens.END: -1}}, 'vocab_size': 303}, 'special tokens lie beyond'),
    ({'tokenizer': with_gaps() | {'special': {tokens.END: 10**9}}, 'vocab_size': 303}, 'special tokens lie beyond'),
    ({'tokenizer': with_gaps() | {'special': {tokens.END: 'x'}}, 'vocab_size': 303}, "'str'"),
])
def test_entries_of_another_type(tmp_path, refused, changes, word):
    write_dataset(tmp_path / 'x', {'train': [7] * 90, 'val': [7] * 90}, **changes)
    for path in (tmp_path / 'x').iterdir():
        path.rename(tmp_path / path.name)
    line = refused()
    assert 'meta.json is damaged or foreign' in line and word in line


DESCRIPTIONS = {
    'char': {'kind': 'char', 'chars': [*map(chr, range(10, 127)), '', '\ud800', '\u4e16', tokens.END]},
    'byte': {'kind': 'byte'},
    'bpe': with_gaps(),
    'word': {'kind': 'word', 'words': ['the', 'cat', '', 'sat', ',', 'catch', tokens.END, '<', '|', 'endoftext', '>']},
    'ids': {'kind': 'ids', 'size': 40},
}


@pytest.mark.parametrize('kind', DESCRIPTIONS)
def test_no_id_ends_a_script(kind):
    text = tokens.tokenizer(DESCRIPTIONS[kind])
    for i in range(text.size + 70):
        shown = tokens.decode(text, [i])
        assert shown.strip(' ') or chr(i) == shown or kind == 'char'
        assert (shown == tokens.MASK) == (i >= text.size)
        assert ('\ufffd' in shown) >= (i in text.gaps)
    every = tokens.decode(text, range(text.size + 70))
    assert every.count(tokens.MASK) == 70 and every.count(tokens.END) == (text.end is not None)
    gaps = {'char': {117}, 'bpe': {256, 257, 258, 259, *range(261, 300), 301}, 'word': {2}}
    assert set(text.gaps) == gaps.get(kind, set())


@pytest.mark.parametrize('kind', [kind for kind in DESCRIPTIONS if kind != 'ids'])
def test_the_end_of_a_document_is_text_where_it_stands_in_one(kind):
    text = tokens.tokenizer(DESCRIPTIONS[kind])
    ids = text.encode(f'{tokens.END}the{tokens.END}')
    assert text.end is not None and text.end not in ids and len(ids) > 3
    assert tokens.decode(text, ids).replace(' ', '') == f'{tokens.END}the{tokens.END}'
    batch = bins.encode_batch([('the', True), (f'the{tokens.END}', False)], text, text.end, np.uint16)
    assert batch.tolist() == text.encode('the') + [text.end] + text.encode(f'the{tokens.END}')


def test_words():
    text = tokens.tokenizer(DESCRIPTIONS['word'])
    assert tokens.decode(text, text.encode('the  cat,\nsat')) == ' the cat , sat' and text.encode('catch') == [5]
    with pytest.raises(ValueError, match="'dog sat' begins with none of the 9 words"):
        text.encode('the dog sat')
    syllables = tokens.tokenizer({'kind': 'word', 'words': ['th', 'e ', 'e', 'c', 'at', ' ']})
    assert tokens.decode(syllables, syllables.encode('the cat')) == 'the cat'
    numbers = tokens.tokenizer(DESCRIPTIONS['ids'])
    assert numbers.encode('3 39\n0') == [3, 39, 0]
    for word in 'the', '40', '-1', '1.5':
        with pytest.raises(ValueError, match='no id from 0 to 39'):
            numbers.encode(word)


@pytest.mark.parametrize('description, meta, expected', [
    (DESCRIPTIONS['byte'], {'documents': {'train': 5}, 'end_of_text': 256}, [256]),
    (DESCRIPTIONS['byte'], {'end_of_text': 256}, [10]),
    ({'kind': 'char', 'chars': ['A', '\n']}, {}, [1]),
    ({'kind': 'char', 'chars': ['A', ' ']}, {}, [1]),
    ({'kind': 'char', 'chars': ['', 'A', 'C']}, {}, [1]),
    (DESCRIPTIONS['word'], {}, [0]),
    (DESCRIPTIONS['ids'], {}, [0]),
])
def test_what_a_text_begins_with(description, meta, expected):
    assert tokens.beginning(tokens.tokenizer(description), meta) == expected


def test_bytes_of_a_token_where_ids_lie_beyond_the_tokenizer():
    ids = np.array([97, 98, 256, 300], np.uint16)
    assert tokens.bytes_per_token({'vocab_size': 320, 'tokenizer': {'kind': 'byte'}}, ids) == 0.5
    assert tokens.bytes_per_token({'vocab_size': 320, 'tokenizer': {'kind': 'ids', 'size': 320}}, ids) is None


# ---------------------------------------------------------------------------------------------------------------------
# packing


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), block_size=st.integers(1, 20))
@settings(deadline=None)
def test_packing_takes_every_token_once_and_leaves_no_gap(lengths, block_size):
    ends = np.cumsum(lengths)
    starts, sizes, row_ends = batches.pack(ends, block_size)
    seen = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes)])
    assert np.array_equal(np.sort(seen), np.arange(ends[-1]))
    rows = np.add.reduceat(sizes, np.concatenate([[0], row_ends[:-1]]))
    assert (rows[:-1] == block_size).all() and 0 < rows[-1] <= block_size
    assert np.array_equal(np.searchsorted(ends, starts, 'right'), np.searchsorted(ends, starts + sizes - 1, 'right'))


def test_packing_keeps_documents_whole_where_they_fit():
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 60, size=5000)
    ends = np.cumsum(lengths)
    starts, sizes, _ = batches.pack(ends, 128)
    begins = np.isin(starts, np.concatenate([[0], ends[:-1]]))
    least = np.maximum(0, lengths - 128).sum()  # what a row cannot hold of the longer ones
    assert least <= sizes[~begins].sum() < 1.01 * least + 128
    end_to_end = sum(length for end, length in zip(ends, lengths) if (end - length) // 128 != (end - 1) // 128)
    assert sizes[~begins].sum() < end_to_end / 3  # what lies across the border of a row, one document after another


@pytest.mark.parametrize('block_size', [7, 32, 4096])
def test_packed_rows_are_what_their_documents_say(block_size):
    docs = documents(100, 0)
    data = np.array(sum(docs, []), np.uint16)
    packed = readers.Packed(data, block_size, EOT, True)
    x, y, which = fetch(packed, np.arange(packed.n_numbers))
    assert packed.n_documents == 100 and packed.count(np.arange(packed.n_numbers)) == len(data)
    found = []
    for row in range(packed.n_numbers):
        for piece in dict.fromkeys(which[row].tolist()):
            here = (which[row] == piece) & (y[row] >= 0)
            if here.any():
                found.append((x[row][here].tolist(), y[row][here].tolist()))
    if block_size > len(data):  # every document is whole
        assert sorted(y for _, y in found) == sorted(docs)
        assert all(x == [EOT, *y[:-1]] for x, y in found)
    text = data.tolist()
    joined = ','.join(map(str, [EOT, *text])) + ','
    assert all(','.join(map(str, [*x, y[-1]])) + ',' in joined for x, y in found)  # y is what follows in the text
    assert sorted(sum((y for _, y in found), [])) == sorted(text)
    assert (y >= 0).sum() == len(data)
    loose = fetch(readers.Packed(data, block_size, EOT, False), np.arange(packed.n_numbers))
    assert loose[2] is None and np.array_equal(loose[0], x) and np.array_equal(loose[1], y)


@pytest.mark.parametrize('causal', [True, False])
def test_packed_loss_is_that_of_each_document_alone(small, monkeypatch, causal):
    monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 4)
    docs = [doc[:length - 1] + [EOT] for doc, length in zip(documents(90, 1, 400), [8, 24, 16, 16, 32, 8] * 15)
            if len(doc) >= length]
    packed = readers.Packed(np.array(sum(docs, []), np.uint16), 32, EOT, True)
    assert packed.n_numbers > 5 and packed.cropped == 0  # these lengths need no cut
    model = small(causal=causal)
    loss, _ = evaluation.measure(model, readers.Rows(['docs'], [packed], [1.0]), 0, CPU, 'float32')
    alone = []
    with torch.no_grad():
        for doc in docs:
            x, y = torch.tensor([[EOT, *doc[:-1]]]), torch.tensor([doc])
            alone.append(model(x, y)[1].item() * len(doc))
    assert loss == pytest.approx(sum(alone) / sum(map(len, docs)), abs=1e-5)
    if causal:  # without the wall between them it is another loss
        packed.is_apart = False
        other, _ = evaluation.measure(model, readers.Rows(['docs'], [packed], [1.0]), 0, CPU, 'float32')
        assert abs(other - loss) > 1e-4


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.filterwarnings('ignore')  # that it is slow where it is not compiled
def test_flex_attention_agrees_with_the_mask(small, monkeypatch, causal):
    """What a GPU takes; on a CPU it has no backward pass."""
    model, x = small(causal=causal), torch.randint(257, (3, 32))
    which = torch.tensor([[0] * 5 + [1] * 27, [2] * 32, list(range(32))])
    with torch.no_grad():
        expected, _ = model(x, x, which)
        dense = gpt.inside_documents
        monkeypatch.setattr(gpt, 'inside_documents', lambda documents, causal, _: dense(documents, causal, True))
        found, _ = model(x, x, which)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def padded(n=50, block_size=64, too_long='cut', seed=0, multiple=1):
    ids, rows = pairs(n, seed)
    return readers.Padded(np.array(ids, np.uint16), block_size, rows, EOT, too_long, multiple), ids, rows


def test_padded_rows_are_as_wide_as_the_longest_and_learn_the_response_alone():
    reader, ids, rows = padded()
    some = np.array([3, 17, 4])
    x, y, which = fetch(reader, some)
    assert which is None and x.shape == y.shape == (3, max(rows[i][2] - rows[i][0] for i in some) - 1)
    for row, i in enumerate(some):
        start, target, end = rows[i]
        length = end - start - 1
        assert x[row, :length].tolist() == ids[start:end - 1]
        expected = [-1] * (target - start - 1) + ids[target:end]
        assert y[row].tolist() == expected + [-1] * (y.shape[1] - len(expected))
    assert reader.count(some) == (y >= 0).sum() == len(np.concatenate([ids[rows[i][1]:rows[i][2]] for i in some]))


def test_padded_loss_is_that_of_each_row_alone(small, monkeypatch):
    monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 7)
    reader, ids, rows = padded()
    model = small(block_size=64)
    loss, accuracy = evaluation.measure(model, readers.Rows(['pairs'], [reader], [1.0]), 0, CPU, 'float32')
    total = right = count = 0
    with torch.no_grad():
        for start, target, end in rows:
            logits, _ = model(torch.tensor([ids[start:end - 1]]), torch.tensor([ids[start + 1:end]]))
            logits, y = logits[0, target - start - 1:], torch.tensor(ids[target:end])
            total += torch.nn.functional.cross_entropy(logits, y, reduction='sum').item()
            right, count = right + (logits.argmax(-1) == y).sum().item(), count + len(y)
    assert loss == pytest.approx(total / count, abs=1e-5) and accuracy == pytest.approx(right / count)


@pytest.mark.parametrize('block_size', [6, 20])
def test_pairs_that_are_too_long(block_size):
    cut, ids, rows = padded(block_size=block_size)
    n_long = sum(end - start - 1 > block_size for start, _, end in rows)
    assert 0 < n_long == cut.n_long and rows[cut.longest][2] - rows[cut.longest][0] == max(e - s for s, _, e in rows)
    for i, (start, target, end) in enumerate(rows):
        x, y, _ = fetch(cut, np.array([i]))
        y = y[y >= 0].tolist()
        assert x.shape[1] <= block_size and y == ids[target:end][:len(y)]
        # the prompt and its end_of_text take one place at least, and y is moved on by one
        assert len(y) == min(end - target, block_size)
        if end - start - 1 <= block_size:
            assert x[0].tolist() == ids[start:end - 1]
    dropped = padded(block_size=block_size, too_long='drop')[0]
    assert dropped.n_numbers == len(rows) - n_long


def test_rows_of_a_step_have_about_the_same_length():
    reader, _, rows = padded(n=600)
    data = readers.Rows(['pairs'], [reader], [1.0])

    def padding(sampling):
        cells = pads = 0
        for step in range(40):
            _, y, _ = data.fetch(found := data.draw(12, 0, step, sampling))
            cells, pads = cells + y.size, pads + y.size - reader.lengths(found).sum()
        return pads / cells
    assert padding('shuffle') < 0.1 and padding('random') < 0.1 < padding('sequential')


@pytest.mark.parametrize('mixture', [False, True])
@pytest.mark.parametrize('mask_prob', [0.0, 0.3])
def test_wider_rows_are_the_same_rows(small, monkeypatch, mixture, mask_prob):
    """Up to the next multiple: the same tokens, targets and hidden places, behind them end_of_text; the same losses."""
    def data(multiple):
        parts = [padded(seed=seed, multiple=multiple)[0] for seed in range(1 + mixture)]
        return readers.Rows(['a', 'b'][:len(parts)], parts, [1 / len(parts)] * len(parts), mask_prob, 257)
    exact, wide = data(1), data(16)
    model = small(block_size=64, vocab_size=258)
    widths = set()
    for step in range(8):
        rows, noise, n_targets = wide.of_step(6, 0, step, 'shuffle')
        assert np.array_equal(rows, exact.of_step(6, 0, step, 'shuffle')[0]) and n_targets == exact.count(rows, noise)
        (x, y, _), (wide_x, wide_y, _) = exact.fetch(rows, noise), wide.fetch(rows, noise)
        lengths = exact.lengths(rows)
        width = lengths.max()
        assert x.shape[1] == width and wide_x.shape == wide_y.shape == (6, -(-width // 16) * 16)
        is_token = np.arange(width) < lengths[:, None]
        assert np.array_equal(wide_x[:, :width][is_token], x[is_token]) and np.array_equal(wide_y[:, :width], y)
        assert (wide_y >= 0).sum() == (y >= 0).sum() == n_targets
        if not mixture:
            assert (wide_x[:, :width][~is_token] == EOT).all() and (wide_x[:, width:] == EOT).all()
        with torch.no_grad():
            loss, wide_loss = (model(torch.from_numpy(a), torch.from_numpy(b))[1].item()
                               for a, b in ((x, y), (wide_x, wide_y)))
        assert wide_loss == pytest.approx(loss, rel=1e-6)
        widths |= {wide_x.shape[1]}
    assert len(widths) > 1
    if not mask_prob:
        monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 7)
        measured = [evaluation.measure(model, rows.parts['a'], 0, CPU, 'float32') for rows in (exact, wide)]
        assert measured[1] == pytest.approx(measured[0], rel=1e-6)


@pytest.mark.parametrize('dynamic', [None, False])  # as train.py compiles, and with every width for itself
def test_padded_rows_have_few_widths_and_few_graphs(small, tmp_path, monkeypatch, dynamic):
    """Widths are multiples, or block_size: 50 steps make as many graphs as there are widths, and no more."""
    from torch._dynamo.testing import CompileCounter
    ids, rows = pairs(120, 0)
    write_dataset(tmp_path / 'data/pairs', {'train': ids, 'val': ids}, {'train': rows, 'val': rows}, pairs=True)
    monkeypatch.chdir(tmp_path)
    settings = {'dataset': 'pairs', 'batch_mode': 'padded', 'block_size': 44}
    (exact, _), (wide, _) = readers.open(settings), readers.open(settings, 16)
    torch.compiler.reset()
    graphs = CompileCounter()  # traces, and compiles nothing
    model = small(block_size=44)
    model.compile(backend=graphs, dynamic=dynamic)
    seen = set()
    for step in range(50):
        rows, *_ = wide['train'].of_step(6, 0, step, 'shuffle')
        x, y, _ = wide['train'].fetch(rows)
        seen |= {x.shape[1]}
        model(torch.from_numpy(x), torch.from_numpy(y))
    torch.compiler.reset()
    assert seen == {16, 32, 44} and 1 <= graphs.frame_count <= len(seen)
    assert len({exact['train'].fetch(exact['train'].draw(6, 0, step, 'shuffle'))[0].shape[1] for step in range(50)}) > 8


def test_training_on_wider_rows(train, hooked, byte_sets):
    """As on a GPU, but for its multiple: other widths, the same losses."""
    args = [*MODES['padded'], '--eval_iters=0']
    exact = train(*args, '--out_dir=a')
    wide = hooked('from kit.base import devices\ndevices.row_multiple = lambda device: 16', *args, '--out_dir=b')
    widths = [int(re.search(r'one micro-step: x \(4, (\d+)\)', result.out)[1]) for result in (exact, wide)]
    assert widths[0] % 16 and widths[1] == -(-widths[0] // 16) * 16
    for name in 'loss', 'val/loss', 'val/accuracy':
        found = [[r[name] for r in records(byte_sets / folder) if name in r] for folder in 'ab']
        assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) > 2


# ---------------------------------------------------------------------------------------------------------------------
# masks


def test_one_in_seven_is_hidden_by_the_rule_of_80_10_10():
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(100, size=(4000, 64)), rng.integers(20, 65, size=4000)
    noise = batches.noise(4000, 64, 1, 2, 3)
    chosen = batches.is_corrupted(noise, lengths, 0.15)
    corrupted = batches.corrupt(x, noise, chosen, 0.15, 100, 100)
    is_token = np.arange(64) < lengths[:, None]
    assert not (chosen & ~is_token).any() and chosen.any(axis=1).all()
    assert np.array_equal(corrupted[~chosen], x[~chosen])
    assert chosen.sum() / is_token.sum() == pytest.approx(0.15, abs=0.002)
    hidden, same = corrupted[chosen] == 100, corrupted[chosen] == x[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / 100, abs=0.01)
    others = corrupted[chosen][~hidden & ~same]
    assert np.bincount(others, minlength=100).min() > 0 and others.max() < 100
    assert not np.array_equal(noise, batches.noise(4000, 64, 1, 2, 4))


def test_a_row_always_has_a_target():
    noise = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.3, 0.4, 0.0]])
    chosen = batches.is_corrupted(noise, np.array([3, 4]), 0.05)
    assert chosen.tolist() == [[False, True, False, False], [False, False, False, True]]
    assert batches.corrupt(np.zeros((2, 4), int), noise, chosen, 0.05, 9, 9).tolist() == [[0, 9, 0, 0], [0, 0, 0, 9]]


def test_masking_in_training(run, byte_sets):
    """As augmentation the targets stay; as an objective they are what was hidden, and the mask is the next free id."""
    rows = lambda is_mlm: readers.Rows(['docs'], [readers.Windows(data, 16)], [1.0], 0.4, 257, is_mlm)
    data = tokens.read_dataset(byte_sets / 'data/docs')[0]['train']
    noise = batches.noise(8, 16, 0)
    x, y, _ = fetch(readers.Windows(data, 16), np.arange(8))
    seen, same, _ = rows(False).fetch(np.arange(8), noise)
    assert np.array_equal(same, y) and 0.2 < (seen != x).mean() < 0.6 and (seen == 257).any()
    seen_too, hidden, _ = rows(True).fetch(np.arange(8), noise)
    assert np.array_equal(seen, seen_too)
    assert np.array_equal(hidden[hidden >= 0], x[hidden >= 0]) and (seen != x)[hidden < 0].sum() == 0
    assert rows(True).count(np.arange(8), noise) == (hidden >= 0).sum()
    assert rows(False).count(np.arange(8), noise) == 8 * 16
    for args, vocab_size in ([], 257), (['--mask_prob=0.2'], 258), (['--objective=mlm'], 258):
        result = run('train.py', '--dataset=docs', *TINY, *args)
        assert result.status == 0, result.err
        saved = torch.load(byte_sets / 'checkpoints/ckpt.pt', weights_only=True)
        assert saved['model_args']['vocab_size'] == vocab_size
        assert saved['model_args'].get('causal', True) == ('--objective=mlm' not in args)
    assert saved['config']['mask_prob'] == 0.15 and 'what it fills in:' in result.out and '[MASK]' in result.out
    result = run('train.py', '--test')
    assert result.status == 0 and re.search(r'test loss \d', result.out), result.err
    result = run('sample.py')
    assert result.status == 2 and 'fill masks' in result.err and result.err.count('\n') == 1


def test_a_mask_for_weights_that_know_none(run, byte_sets):
    assert run('train.py', '--dataset=docs', *TINY, '--out_dir=plain').status == 0
    plain = torch.load(byte_sets / 'plain/ckpt.pt', weights_only=True)
    result = run('train.py', '--dataset=docs', *TINY, '--init_from=plain/ckpt.pt', '--objective=mlm', '--max_iters=2',
                 '--learning_rate=1e-9', '--min_lr=0')
    assert result.status == 0, result.err
    wide = torch.load(byte_sets / 'checkpoints/ckpt.pt', weights_only=True)['model']['transformer.wte.weight']
    old = plain['model']['transformer.wte.weight']
    assert wide.shape == (258, 32)
    torch.testing.assert_close(wide, torch.cat([old, old.mean(0, keepdim=True)]), atol=1e-6, rtol=0)
    result = run('train.py', '--init_from=resume', '--out_dir=plain', '--mask_prob=0.1', '--max_iters=20')
    assert result.status == 2 and 'mask_prob' in result.err and '--init_from=FILE.pt' in result.err


# ---------------------------------------------------------------------------------------------------------------------
# order, mixtures, and promises 1 and 2 in every mode


@pytest.mark.parametrize('rows', [7, 12, 64])
def test_listed_rows_come_once_an_epoch(rows):
    reader, _, _ = padded(n=50)
    packed = readers.Packed(np.array(sum(documents(90, 0), []), np.uint16), 24, EOT, True)
    for one in reader, packed:
        n, data = one.n_numbers, readers.Rows(['one'], [one], [1.0])
        drawn = {}
        for sampling in 'shuffle', 'sequential', 'random':
            steps = [data.draw(rows, 3, step, sampling) for step in range(-(-3 * n // rows))]
            assert all(step.shape == (rows,) and 0 <= step.min() and step.max() < n for step in steps)
            drawn[sampling] = steps
        assert not np.array_equal(drawn['shuffle'][0], data.draw(rows, 4, 0, 'shuffle'))
        for sampling in 'shuffle', 'sequential':  # the borders of epochs lie within steps
            counts = np.bincount(np.concatenate(drawn[sampling]), minlength=n)
            assert counts.min() >= len(drawn[sampling]) * rows // n
            assert counts.max() <= -(-len(drawn[sampling]) * rows // n)
        if one is packed:
            assert np.array_equal(np.concatenate(drawn['sequential'])[:n], np.arange(n))


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4), n=st.integers(0, 3000))
def test_mixtures_keep_their_shares(weights, n):
    counts, after = batches.apportion(n, weights), batches.apportion(n + 1, weights)
    assert sum(counts) == n and sum(after) == n + 1
    assert sorted(b - a for a, b in zip(counts, after)) == [0] * (len(weights) - 1) + [1]
    assert all(abs(count - n * weight / sum(weights)) <= len(weights) for count, weight in zip(counts, weights))


def test_a_mixture_takes_its_rows_from_each(byte_sets, monkeypatch, run):
    monkeypatch.chdir(byte_sets)
    data, _ = readers.open({'dataset': 'docs:3,other', 'block_size': 16})
    docs, other = (tokens.read_dataset(byte_sets / 'data' / name)[0]['train'] for name in ('docs', 'other'))
    for sampling in 'random', 'shuffle', 'sequential':
        from_docs = 0
        for step in range(25):
            rows = data['train'].draw(10, 0, step, sampling)
            x, y, _ = data['train'].fetch(rows)
            for row, row_x, row_y in zip(rows, x, y):
                source, start = (docs, row) if row < len(docs) - 16 else (other, row - (len(docs) - 16))
                assert row_x.tolist() == source[start:start + 16].tolist()
                assert row_y.tolist() == source[start + 1:start + 17].tolist()
                from_docs += source is docs
        assert abs(from_docs - 187.5) <= 1
    result = run('train.py', '--dataset=docs:3,other', *TINY)
    assert result.status == 0, result.err
    last = [record for record in records(byte_sets / 'checkpoints') if 'val/loss' in record][-1]
    assert last['val/loss'] == pytest.approx(0.75 * last['val/loss/docs'] + 0.25 * last['val/loss/other'])
    assert re.search(r'step 10: train loss .*, val/loss/docs [\d.]+, val/loss/other [\d.]+$', result.out, re.M)
    tested = run('train.py', '--test')
    assert 'test of docs loss' in tested.out and 'test of other loss' in tested.out


@pytest.mark.parametrize('mode', MODES)
def test_the_same_step_however_it_is_cut(run, pair, byte_sets, mode):
    """8 x 1, 2 x 4, and 2 x 4 on two processes: the same tokens, and each target counts the same."""
    args = [*small_run(*MODES[mode]), '--eval_interval=0', '--save_interval=0', '--max_iters=6']
    whole = run('train.py', *args, '--batch_size=8', '--out_dir=a')
    assert whole.status == 0, whole.err
    cut = run('train.py', *args, '--batch_size=2', '--gradient_accumulation_steps=4', '--out_dir=b')
    shared = pair(*MODES[mode], '--eval_interval=0', '--save_interval=0', '--max_iters=6', '--batch_size=2',
                  '--gradient_accumulation_steps=4', '--out_dir=c')
    expected = {r['step']: (r['loss'], r['grad_norm']) for r in records(byte_sets / 'a') if 'loss' in r}
    assert len(expected) == 6
    for result, name in (cut, 'b'), (shared, 'c'):
        assert result.status == 0, result.err
        for record in records(byte_sets / name):
            if 'loss' in record:
                assert (record['loss'], record['grad_norm']) == pytest.approx(expected[record['step']], abs=2e-5)


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode not in ('windows', 'mixture')])
def test_resume_is_exact(run, byte_sets, mode):
    args = [*TINY, *MODES[mode], '--dropout=0.1', '--sampling=shuffle']
    assert run('train.py', *args, '--out_dir=a').status == 0
    assert run('train.py', *args, '--out_dir=b', '--max_iters=5', '--lr_decay_iters=10').status == 0
    result = run('train.py', '--init_from=resume', '--out_dir=b', '--max_iters=10', '--device=cpu')
    assert result.status == 0, result.err
    a, b = ({r['step']: r['loss'] for r in records(byte_sets / name) if 'loss' in r} for name in 'ab')
    assert a == b and len(a) == 10
    replay = run('train.py', '--out_dir=b', '--inspect_step=7', '--device=cpu')
    assert 'the loss is the logged one, bit for bit' in replay.out, replay.out + replay.err


def test_max_epochs(run, byte_sets):
    args = [*(word for word in TINY if not word.startswith('--max_iters')), '--dataset=pairs', '--batch_mode=padded',
            '--block_size=48', '--sampling=shuffle', '--batch_size=7']
    result = run('train.py', *args, '--max_epochs=1.5')
    assert result.status == 0, result.err
    assert 'max_iters: 26 (1.5 epochs)' in result.out  # 120 pairs, 7 a step
    assert len(losses(result)) == 26 and re.search(r'^iter 25: .*, epoch 1\.52$', result.out, re.M)
    late = run('train.py', *args, '--max_epochs=1.5', '--swa_start=26')
    assert late.status == 2 and 'swa_start = 26' in late.err and late.err.count('\n') == 1
    longer = run('train.py', '--init_from=resume', '--max_iters=30')  # what is given now outdoes what was
    assert longer.status == 0 and len(losses(longer)) == 4, longer.out + longer.err


# ---------------------------------------------------------------------------------------------------------------------
# answers


def test_answers_are_greedy_and_measured(run, byte_sets):
    from sacrebleu.metrics import BLEU
    args = [*TINY, '--dataset=pairs', '--batch_mode=padded', '--block_size=48', '--max_iters=150', '--eval_interval=0',
            '--learning_rate=1e-2', '--save_interval=0', '--log_interval=0']
    result = run('train.py', *args)
    assert result.status == 0 and result.out.count('its answer: ') == 3, result.err
    saved = torch.load(byte_sets / 'checkpoints/ckpt.pt', weights_only=True)
    model = gpt.GPT(gpt.GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    model.eval()
    data = np.fromfile(byte_sets / 'data/pairs/test.bin', '<u2').tolist()
    rows = np.load(byte_sets / 'data/pairs/test.rows.npy').tolist()
    longest = max(end - target for _, target, end in rows)
    answers, references = [], []
    for start, target, end in rows:
        ids = data[start:target][-(48 - min(longest, 24) + 1):]
        n_prompt = len(ids)
        with torch.no_grad():
            while len(ids) - n_prompt < min(longest, 24) and (ids[-1] != EOT or len(ids) == n_prompt):
                ids.append(model(torch.tensor([ids[-48:]]))[0][0, -1, :257].argmax().item())
        answers.append(bytes(i for i in ids[n_prompt:] if i != EOT).decode(errors='replace'))
        references.append(bytes(data[target:end - 1]).decode())
    exact = sum(a == b for a, b in zip(answers, references)) / len(rows)
    score = BLEU().corpus_score(answers, [references]).score
    tested = run('train.py', '--test', '--checkpoint=checkpoints/ckpt.pt')
    assert tested.status == 0, tested.err
    assert f'BLEU {score:.2f} (nrefs:1' in tested.out
    assert f'exact match {exact:.2%} (greedy, 30 of 30 pairs)' in tested.out
    prompt = bytes(data[rows[0][0]:rows[0][1] - 1]).decode()
    sampled = run('sample.py', f'--start={prompt}', '--temperature=0', '--checkpoint=checkpoints/ckpt.pt',
                  f'--max_new_tokens={min(longest, 24)}')
    assert sampled.out.split('steps\n')[1] == f'{prompt}\n{answers[0]}\n', sampled.err


def test_a_split_of_one_pair(run, byte_sets):
    ids, rows = pairs(1, 5)
    np.array(ids, '<u2').tofile(byte_sets / 'data/pairs/test.bin')
    np.save(byte_sets / 'data/pairs/test.rows.npy', np.array(rows))
    meta = json.loads((byte_sets / 'data/pairs/meta.json').read_text())
    meta['files'] = {}
    (byte_sets / 'data/pairs/meta.json').write_text(json.dumps(meta))
    args = [*TINY, '--dataset=pairs', '--batch_mode=padded', '--block_size=48', '--max_iters=1']
    assert run('train.py', *args).status == 0
    tested = run('train.py', '--test')
    assert tested.status == 0 and '1 of 1 pairs' in tested.out, tested.err


def test_models_of_two_objectives_are_no_ensemble(run, byte_sets):
    assert run('train.py', *TINY, '--dataset=docs', '--max_iters=1', '--out_dir=a').status == 0
    assert 'sample.py' not in run('train.py', *TINY, '--dataset=docs', '--objective=mlm', '--max_iters=1',
                                  '--out_dir=b').out
    result = run('train.py', '--test', '--checkpoint=a/ckpt.pt,b/ckpt.pt')
    assert result.status == 2 and 'objective' in result.err and result.err.count('\n') == 1


def test_descriptions_of_one_tokenizer():
    name = {'kind': 'bpe', 'name': 'gpt2'}
    whole = name | {'ranks': 'YQ==', 'pattern': '.'}
    assert tokens.is_same_tokenizer(name, whole) and not tokens.is_same_tokenizer(name, whole | {'name': 'bpe'})
    assert not tokens.is_same_tokenizer(whole, whole | {'ranks': 'Yg=='})
    assert not tokens.is_same_tokenizer({'kind': 'byte'}, {'kind': 'char', 'chars': ['a']})


def test_micro_steps_share_what_a_step_draws(byte_sets, monkeypatch):
    monkeypatch.chdir(byte_sets)
    rows = readers.open({'dataset': 'docs', 'block_size': 16, 'mask_prob': 0.15, 'objective': 'mlm'})[0]['train']
    numbers, noise, n_targets = rows.of_step(8, 3, 5, 'shuffle', 1)
    assert np.array_equal(numbers, rows.draw(8, 3, 5, 'shuffle', 1))
    assert np.array_equal(noise, rows.noise(8, 3, 5, 1)) and n_targets == (rows.fetch(numbers, noise)[1] >= 0).sum()
    assert rows.of_step(8, 3, 5, 'shuffle', 1)[1] is noise and rows.of_step(8, 3, 6, 'shuffle', 1)[1] is not noise


def test_noise_is_not_what_draws_rows():
    noise = batches.noise(4, 1, 1337, 5, 0)[:, 0]
    for number in range(4):
        starts = batches.window_starts(10**9 + 1, 1, 4, 1337, 5, 'random', number=number)
        assert not np.allclose(starts / 10**9, noise, atol=1e-6)


def test_a_model_of_documents_begins_one(run, byte_sets):
    result = run('train.py', *TINY, '--dataset=docs', '--batch_mode=packed')
    assert result.status == 0 and 'attention within documents: a dense mask (the choice on cpu)\n' in result.out
    own = run('sample.py', '--max_new_tokens=20').out
    asked = run('sample.py', '--max_new_tokens=20', f'--start={tokens.END}', f'--separator={tokens.END}').out
    assert own.split('steps\n')[1] == asked.split('steps\n')[1].removeprefix(tokens.END) and own


def test_averages_are_measured_in_their_mode(run, byte_sets):
    assert run('train.py', *TINY, *MODES['packed'], '--save_interval=2').status == 0
    result = run('checkpoint_averaging.py', '--num_checkpoints=2')
    assert result.status == 0 and 'packed: val of docs has 40 documents' in result.out, result.err
    newest = re.search(r'val loss ([\d.]+), test loss ([\d.]+): step_0000010.pt', result.out)
    tested = run('train.py', '--test', '--checkpoint=checkpoints/step_0000010.pt')
    assert f'test loss {newest[2]},' in tested.out


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong is told


@pytest.mark.parametrize('args, named', [
    (['--dataset=tiny', '--batch_mode=packed'], ['packed', 'tiny', 'end-of-text', '--batch_mode=windows']),
    (['--dataset=docs', '--batch_mode=padded'], ['padded', 'docs', 'no pairs', 'prepare.py']),
    (['--dataset=docs', '--batch_mode=packt'], ['batch_mode', 'packt', 'packed']),
    (['--dataset=docs', '--objective=bert'], ['objective', 'bert', 'mlm']),
    (['--dataset=docs', '--mask_prob=1.5'], ['mask_prob', '1.5']),
    (['--dataset=pairs', '--batch_mode=padded', '--objective=mlm'], ['mlm', 'padded', 'windows or packed']),
    (['--dataset=pairs', '--batch_mode=padded', '--too_long=drop', '--block_size=2'], ['too_long', 'no pair', '= 2']),
    (['--dataset=pairs', '--batch_mode=padded', '--too_long=skip'], ['too_long', 'skip', 'drop']),
    (['--dataset=docs:0.5,tiny:0.5'], ['docs', 'tiny', 'different tokenizers']),
    (['--dataset=docs:1e308,other:1e308'], ['docs:1e308', 'a:0.7']),
    (['--dataset=docs:1e308,other:1e-308'], ['other', 'a:0.7']),
    (['--dataset=docs:nan,other:1'], ['docs:nan', 'a:0.7']),
    (['--dataset=docs:1,other:' + '9' * 400], ['a:0.7']),
    (['--dataset=docs:1,other:0.' + '0' * 400 + '1'], ['a:0.7']),
    (['--dataset=docs:x'], ["'docs:x'", 'a:0.7,b:0.3']),
    (['--dataset=docs:1,other:-1'], ['other:-1', 'above 0']),
    (['--dataset=docs,nowhere'], ['nowhere', 'prepare.py']),
    (['--dataset=docs', '--max_epochs=-1'], ['max_epochs', '-1']),
    (['--dataset=docs', '--max_epochs=1', '--max_iters=1'], ['max_epochs', 'max_iters', '--max_epochs=0']),
    (['--dataset=docs:0.5,docs:0.3'], ['docs', 'twice']),
    (['--dataset=docs', '--max_epochs=1', '--max_minutes=1', '--warmup_iters=25'], ['max_epochs', 'max_minutes']),
])
def test_mistakes(run, byte_sets, args, named):
    result = run('train.py', *TINY, *args)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err
    assert not (byte_sets / 'checkpoints').exists()


def npy(header):
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode()


def npz():
    file = io.BytesIO()
    np.savez(file, rows=np.zeros((2, 3), np.int64))
    return file.getvalue()


@pytest.mark.parametrize('rows, named', [
    (b'not an array', 'damaged'),
    ([[0, 5, 9_000_000]], 'does not lie in'),
    ([[5, 5, 9]], 'does not lie in'),
    ([[0, 5]], 'shape'),
    (np.array([{}, []], object), 'object'),
    (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999, 3), }"), 'damaged'),
    (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 3), }"), 'damaged'),
    (npy('[' * 3000), 'damaged'),
    (npy("{'descr': '<i8'"), 'damaged'),
    (npz(), 'damaged'),
    (npz()[:40], 'damaged'),
])
def test_damaged_rows(run, byte_sets, rows, named):
    path = byte_sets / 'data/pairs/train.rows.npy'
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        np.save(path, rows if isinstance(rows, np.ndarray) else np.array(rows, np.int64))
    result = run('train.py', *TINY, '--dataset=pairs', '--batch_mode=padded')
    assert result.status == 2 and 'train.rows.npy' in result.err and named in result.err and result.err.count('\n') == 1


def test_long_pairs_are_counted_and_named(run, byte_sets):
    result = run('train.py', *TINY, '--dataset=pairs', '--batch_mode=padded', '--block_size=20', '--max_iters=1')
    assert result.status == 0, result.err
    rows = np.load(byte_sets / 'data/pairs/train.rows.npy')
    lengths = rows[:, 2] - rows[:, 0] - 1
    assert (f'{(lengths > 20).sum()} of the 120 pairs in train of pairs are longer than block_size = 20 (the longest, '
            f'pair {lengths.argmax()}, has {lengths.max()} tokens); their prompts are cut from the left') in result.out


def test_ids_that_do_not_fit(run, byte_sets):
    path = byte_sets / 'data/docs/meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'vocab_size': 70_000}))
    result = run('train.py', *TINY, '--dataset=docs')
    assert result.status == 2 and 'do not fit uint16' in result.err and result.err.count('\n') == 1


def test_the_tokenizer_of_a_dataset_has_changed(run, byte_sets):
    """A folder that was prepared anew with other ids: neither a resume nor a test takes it."""
    assert run('train.py', *TINY, '--dataset=docs').status == 0
    path = byte_sets / 'data/docs/meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        'tokenizer': {'kind': 'char', 'chars': [chr(i + 200) for i in range(257)]}}))
    for args in ['--init_from=resume', '--max_iters=20'], ['--test']:
        result = run('train.py', *args)
        assert result.status == 2 and 'tokenizer' in result.err and result.err.count('\n') == 1
