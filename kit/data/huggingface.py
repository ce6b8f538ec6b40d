"""
The tokenizer in a Hugging Face folder, as meta.json describes one. Of one kind alone, GPT-2's: byte-level BPE, with its
way to split a text. What says otherwise is refused by name.
"""

import hashlib
import json
import math
import os
import re
from itertools import pairwise

from kit.base.errors import explained, fail, shown
from kit.data import tokens

# how GPT-2 splits a text, and the sha256 of its tokens in the order of their ids, as tokens.describe_bpe has them
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_RANKS = '6c3a12d345e638764f3f646a81f16ab08b9a648229cddc89fb341b4bdad3b7ea'
SPECIAL = re.compile(r'<.+>|\[.+\]')  # what a vocab.json may hold beside bytes and what merges make: <pad>, [MASK], END

# what the files must say, where they say anything ('a.b' is b in a), for the ids to be those that tiktoken makes
PIPELINE = {'model.type': ['BPE', None], 'model.dropout': [None, 0], 'model.continuing_subword_prefix': ['', None],
            'model.end_of_word_suffix': ['', None], 'model.byte_fallback': [False, None],
            'model.ignore_merges': [False, None], 'normalizer': [None], 'pre_tokenizer.type': ['ByteLevel'],
            'pre_tokenizer.add_prefix_space': [False], 'pre_tokenizer.use_regex': [True, None],
            'post_processor.type': ['ByteLevel', 'TemplateProcessing', None],
            'post_processor.special_tokens': [{}, None]}  # what it puts around every text
TOKENIZER_CONFIG = {'add_prefix_space': [False, None], 'add_bos_token': [False, None], 'add_eos_token': [False, None],
                    'do_lower_case': [False, None],
                    'tokenizer_class': ['GPT2Tokenizer', 'GPT2TokenizerFast', 'PreTrainedTokenizerFast',
                                        'TokenizersBackend', None]}


def read_tokenizer(folder, n_ids):
    """
    What describes the tokenizer of a folder, out of its tokenizer.json, else its vocab.json and merges.txt: vocab_size,
    tokenizer and, where it has one, end_of_text. None where there is none at all. n_ids: how many the model knows.
    """
    path, table = folder / 'tokenizer.json', folder / 'vocab.json'
    check_values(folder / 'tokenizer_config.json', read_json(folder / 'tokenizer_config.json', {}), TOKENIZER_CONFIG)
    if os.path.isfile(path):
        found = read_json(path)
        check_values(path, found, PIPELINE)
        with explained(f'{path} cannot be read', 'copy it again'):
            vocab, merges = found['model']['vocab'], found['model']['merges']
            merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]
            added = {token['content']: token['id'] for token in found.get('added_tokens') or []}
            special = {token['content'] for token in found.get('added_tokens') or [] if token['special']}
    elif os.path.isfile(table) or os.path.isfile(folder / 'merges.txt'):
        path, vocab, added = table, read_json(table), read_json(folder / 'added_tokens.json', {})
        with explained(f'{folder / "merges.txt"} cannot be read', 'copy it again'):
            lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
            merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
        named = read_json(folder / 'special_tokens_map.json', {})
        with explained(f'{folder / "special_tokens_map.json"} cannot be read', 'copy it again'):
            special = {name['content'] if isinstance(name, dict) else name for value in named.values()
                       for name in (value if isinstance(value, list) else [value])}
    elif others := sorted(file.name for end in ('vocab.*', '*.model', '*.tiktoken') for file in folder.glob(end)):
        fail(f'{folder}: its tokenizer, in {others[0]}, is not read; only tokenizer.json can be, or vocab.json and '
             "merges.txt, of GPT-2's kind")
    else:
        return None
    if words := added.keys() - special - {tokens.END}:
        fail(f'{path}: the added token {shown(min(words, key=str))} is a word of texts, and only special ones are read')
    with explained(f"{path} holds no vocabulary of GPT-2's kind", 'others are not read'):
        description = tokens.describe_bpe(encoding_of(vocab, merges, added, n_ids))
    if hashlib.sha256(description['ranks'].encode()).hexdigest() == GPT2_RANKS:
        description['name'] = 'gpt2'
    meta = {'vocab_size': 1 + max((vocab | added).values()), 'tokenizer': description}
    if tokens.END in description['special']:
        meta['end_of_text'] = description['special'][tokens.END]
    print(f'tokenizer: {path}, {meta["vocab_size"]:,} ids')
    return meta


def read_json(path, missing=None):
    """The object that a JSON file holds; or `missing`, if that is given, where there is no such file."""
    if missing is not None and not os.path.isfile(path):
        return missing
    with explained(f'{path} cannot be read', 'copy it again'):
        found = json.loads(path.read_text(encoding='utf-8-sig'))
        if not isinstance(found, dict):
            raise TypeError(f'it holds a {type(found).__name__}, no object')
    return found


def check_values(path, found, allowed):
    """Each of these keys must have one of its values."""
    for name, values in allowed.items():
        value = found
        for key in name.split('.'):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in values:
            fail(f'{path}: {name} = {shown(value)} is not read here; it would have to be {shown(values[0])}')


def encoding_of(vocab, merges, added, n_ids):
    """
    tiktoken's encoding of a vocabulary {token: id}, its merges [(left, right)] and its added tokens. tiktoken knows no
    merges: it joins what makes the token of the lowest id. Raises ValueError where these merges would do otherwise.
    """
    import tiktoken
    byte_of = {char: byte for byte, char in enumerate(tokens.byte_level_characters())}
    made, ids = [left + right for left, right in merges], vocab | added
    if missing := [token for token in [*byte_of, *made] if token not in vocab]:
        raise ValueError(f'it lacks the token {missing[0]!r}')
    if beyond := [token for token, i in ids.items() if type(i) is not int or not 0 <= i < n_ids]:
        raise ValueError(f'{beyond[0]!r} has the id {ids[beyond[0]]}, and vocab_size in config.json is {n_ids}')
    if len({*ids.values()}) < len(ids) or any(vocab.get(token, i) != i for token, i in added.items()):
        raise ValueError('two tokens have one id, or one has two')
    if both := added.keys() & {*byte_of, *made}:
        raise ValueError(f'the added token {min(both)!r} is a token of the text as well')

    def in_bytes(token):
        return bytes(byte_of[char] for char in token)
    ranks = {in_bytes(token): vocab[token] for token in [*byte_of, *made]}
    for before, token, pair in zip(['', *made], made, merges):
        rises = not before or vocab[before] < vocab[token]
        if not rises or last_pair(in_bytes(token), ranks) != [in_bytes(part) for part in pair]:
            raise ValueError(f'the order of its ids is not that of its merges, at {" ".join(pair)!r}')
    unmade = sorted(vocab.keys() - {*byte_of, *made, *added})
    if words := [token for token in unmade if not SPECIAL.fullmatch(token)]:
        raise ValueError(f'no merge makes {words[0]!r}')
    special = added | {token: vocab[token] for token in unmade}
    return tiktoken.Encoding('bpe', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def last_pair(token, ranks):
    """The pieces that BPE has made of the bytes of a token before it would join what makes the token itself."""
    pieces = [token[i:i + 1] for i in range(len(token))]
    while True:
        rank, i = min((ranks.get(one + other, math.inf), i) for i, (one, other) in enumerate(pairwise(pieces)))
        if rank >= ranks[token]:
            return pieces
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
