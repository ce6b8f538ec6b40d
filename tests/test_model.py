"""The model against plain arithmetic: attention, loss, cache, and the draw of the next token."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from no_wait import NoWait, Waits
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import model as models
from kit.run import presets
from kit.watch import inside
from model import GPT, GPTConfig

CONFIG = dict(block_size=16, vocab_size=23, n_layer=3, n_head=2, n_embd=16, dropout=0.0)
GPT2 = {'GPT-2': {'bias': True}, 'no bias': {'bias': False}}
# each ingredient put into GPT-2, all of them, and each of them left out
OTHERS = {f'{name}={value}': {name: value} for name, kind in presets.kinds_of(GPTConfig).items()
          for value in (kind if isinstance(kind, tuple) else [23] if kind is int else [True, False])
          if value != GPTConfig.PRESETS['gpt2'][name]}
MODERN = GPTConfig.PRESETS['modern']
LEFT_OUT = {f'modern, {name}={value}': MODERN | {name: value} for name, value in GPTConfig.PRESETS['gpt2'].items()
            if MODERN[name] != value}
LEARNED = GPT2 | {name: change for name, change in OTHERS.items() if 'position' not in change}
ROPE = {'rope': {'position': 'rope'}, 'modern': MODERN}


def make_model(change, seed=0):
    """With weights far from the initialisation, where mistakes in it would hide."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**CONFIG | change)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def each(architectures):
    """For a test that takes a model: each of these."""
    return pytest.mark.parametrize('model', architectures.values(), ids=architectures.keys(), indirect=True)


every = each(GPT2 | OTHERS | {'modern': MODERN} | LEFT_OUT)


@pytest.fixture(params=[{'bias': False}, MODERN], ids=['GPT-2', 'modern'])
def model(request):
    return make_model(request.param)


def by_hand(model, idx):
    """GPT-2's logits for one row, token by token and head by head, as the papers write them."""
    w, c = model.state_dict(), model.config
    linear = lambda x, name: x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return x * w[f'{name}.weight'] + w.get(f'{name}.bias', 0)
    x = torch.stack([w['transformer.wte.weight'][i] + w['transformer.wpe.weight'][t] for t, i in enumerate(idx)])
    for layer in range(c.n_layer):
        h, size = f'transformer.h.{layer}', c.n_embd // c.n_head
        q, k, v = linear(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn').split(c.n_embd, dim=-1)
        y = torch.zeros_like(x)
        for head in range(c.n_head):
            s = slice(head * size, (head + 1) * size)
            for t in range(len(idx)):
                scores = torch.stack([q[t, s] @ k[u, s] for u in range(t + 1)]) / math.sqrt(size)
                y[t, s] = sum(p * v[u, s] for u, p in enumerate(scores.softmax(0)))
        x = x + linear(y, f'{h}.attn.c_proj')
        z = linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')
        x = x + linear(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T


@each(GPT2)
def test_logits_and_loss_are_the_papers(model):
    idx, targets = torch.randint(23, (2, 11)), torch.randint(23, (2, 11))
    targets[0, 3:5] = -1
    logits, loss = model(idx, targets)
    expected = torch.stack([by_hand(model, row) for row in idx])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    terms = [-expected[b, t].log_softmax(0)[targets[b, t]] for b in range(2) for t in range(11) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, sum(terms) / len(terms), rtol=1e-4, atol=1e-4)
    last, none = model(idx)
    assert none is None and last.shape == (2, 1, 23)
    torch.testing.assert_close(last[:, 0], logits[:, -1])


def test_a_config_takes_what_a_checkpoint_has():
    """Fields that it lacks have their defaults; it keeps nanoGPT's seven, and others where they are no defaults."""
    config = GPTConfig(n_layer=2, n_head=0, n_embd=192, block_size=8, vocab_size=5)
    assert config.n_head == 3 and config.bias is True and config.causal is True
    assert config.args() == dict(n_layer=2, n_head=3, n_embd=192, block_size=8, vocab_size=5, bias=True, dropout=0.0)
    assert GPTConfig(**config.args()) == config
    other = GPTConfig(**config.args() | {'causal': False, 'gelu_approximate': 'tanh', 'dropout': 0})
    assert other.args() == config.args() | {'causal': False, 'gelu_approximate': 'tanh'}


@pytest.mark.parametrize('change', [{'n_layer': 0}, {'n_head': -1}, {'n_head': 3}, {'block_size': 'x'}, {'bias': None},
                                    {'n_embd': 16.0}, {'dropout': 'much'}, {'gelu_approximate': 3},
                                    {'dropout': 1.0}, {'bias': 1}, {'ngram_embeddings': -1},
                                    {'ngram_embeddings': 10**20}])
def test_a_config_refuses_what_will_not_do(change):
    name, = change
    with pytest.raises(ValueError, match=name):
        GPTConfig(**CONFIG | change)


@every
def test_no_model_has_fewer_numbers_than_its_config_says(model):
    """So that a file cannot ask for a table that takes all memory: this is asked before a model is made."""
    assert model.config.least_numbers() <= model.count_params(non_embedding=False)
    table = GPTConfig(vocab_size=10**6, n_embd=8, n_head=1, n_layer=2, ngram_embeddings=10**9)
    assert table.least_numbers() > 16 * 10**9


def test_weights_of_another_size(model):
    """Positions are cut, new ids are the mean of the others; what fits stays as it is."""
    model = GPT(GPTConfig(**CONFIG))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.fitted(state).items())
    other = GPT(GPTConfig(**CONFIG | {'block_size': 5, 'vocab_size': 25}))
    other.load_state_dict(other.fitted(state))
    assert torch.equal(other.transformer.wpe.weight, state['transformer.wpe.weight'][:5])
    wte = state['transformer.wte.weight']
    torch.testing.assert_close(other.lm_head.weight, torch.cat([wte, wte.mean(0, keepdim=True).expand(2, -1)]))
    assert set(state) == set(model.state_dict()) and len(wte) == 23  # what was given is not changed


def test_new_ids_change_nothing_for_the_old():
    model, ids = make_model(MODERN), torch.randint(23, (2, 16))
    other = GPT(GPTConfig(**CONFIG | MODERN | {'vocab_size': 25})).eval()
    other.load_state_dict(other.fitted(model.state_dict()))
    torch.testing.assert_close(other(ids, ids)[0][..., :23], model(ids, ids)[0])


def test_the_masks_of_old_nanogpt_are_left_out(model):
    """But not what a model has of that name itself."""
    state = model.state_dict() | {'transformer.h.0.attn.bias': torch.ones(1, 1, 16, 16).tril()}
    assert model.fitted(state).keys() == model.state_dict().keys()
    model.transformer.h[0].attn.bias = torch.nn.Parameter(torch.ones(16))
    assert 'transformer.h.0.attn.bias' in model.fitted(model.state_dict())


def test_the_last_two_and_three_tokens_have_vectors():
    """Beside that of the token; by numbers of 64 bits that wrap around. What stands before a text is 0."""
    model, n = make_model({'ngram_embeddings': 50, 'position': 'rope'}), 50
    ids, documents = torch.randint(23, (2, 9)), torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [3] * 9])
    table, seen = model.transformer.ngrams.weight, []
    model.transformer.drop.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.hidden(ids, documents=documents)
    for row in range(2):
        for t in range(9):
            before = [ids[row, t - k].item() + 1 if t >= k and documents[row, t - k] == documents[row, t] else 0
                      for k in (1, 2)]
            key, vector = ids[row, t].item() * models.HASH[0], model.transformer.wte.weight[ids[row, t]]
            for k in 1, 2:
                key ^= before[k - 1] * models.HASH[k]
                key = (key + 2**63) % 2**64 - 2**63
                vector = vector + table[(key >> 16 * (k - 1)) % n + (k - 1) * n]
            torch.testing.assert_close(seen[0][row, t], vector)


@pytest.mark.parametrize('V', [64, 65, 256, 50257])
def test_few_ngrams_share_a_vector(V):
    """The pairs and triples of a text meet as many of 8192 rows as they would by chance."""
    model = GPT(GPTConfig(**CONFIG | {'ngram_embeddings': 8192, 'vocab_size': V}))
    ids = (V ** torch.rand(12_000) - 1).long()  # the low ones often, as in a text
    rows = model.ngrams(ids[None], torch.arange(len(ids)), None)[:, 0]
    for n, table in enumerate(rows, start=2):
        assert 8192 * (n - 2) <= table.min() and table.max() < 8192 * (n - 1)
        n_grams = len(ids.unfold(0, n, 1).unique(dim=0))
        assert len(table.unique()) > 0.95 * 8192 * (1 - math.exp(-n_grams / 8192)), n_grams


@every
def test_a_token_sees_nothing_that_comes_later(model):
    idx = torch.randint(23, (1, 16))
    before = model(idx, idx)[0][:, :9]
    idx[:, 9:] = (idx[:, 9:] + 1) % 23
    assert torch.equal(before, model(idx, idx)[0][:, :9])


@every
def test_cached_logits_are_the_uncached(model):
    idx = torch.randint(23, (3, 16))
    caches = [models.KVCache(16) for _ in range(3)]
    with torch.no_grad():
        hidden = [model.hidden(idx[:, :5], caches)] + [model.hidden(idx[:, t:t + 1], caches) for t in range(5, 16)]
        torch.testing.assert_close(torch.cat(hidden, dim=1), model.hidden(idx), rtol=1e-4, atol=1e-5)


@every
def test_documents_that_share_a_row_are_read_as_if_each_were_alone(model):
    """And so the loss is the mean over their tokens, and a token has the gradient that it has alone."""
    parts = [torch.randint(23, (n,)) for n in (4, 1, 6, 5)]
    row, documents = torch.cat(parts)[None], torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])[None]
    shared = model.hidden(row, documents=documents)
    alone = torch.cat([model.hidden(part[None]) for part in parts], dim=1)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    targets = torch.randint(23, (1, 16))
    loss = model(row, targets, documents)[1]
    terms = F.cross_entropy(model.lm_head(alone)[0], targets[0])
    torch.testing.assert_close(loss, terms, rtol=1e-4, atol=1e-5)


@every
def test_the_attention_in_pictures_is_the_one_that_computes(model):
    """Each layer's, whose values it weighs: what comes out of the layer is made again from the picture of it."""
    seen, row = {}, torch.randint(23, (1, 11))
    for layer in range(3):
        attn = model.transformer.h[layer].attn
        attn.register_forward_hook(lambda attn, args, out: seen.update({attn: (args, out)}))
    maps = inside.attention(model, row[0])
    assert maps.shape == (3, 2, 11, 11) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    assert np.allclose(maps, np.tril(maps))
    for layer, (attn, (args, out)) in zip(maps, seen.items()):
        _, _, v = attn.heads(*args[:2])
        y = (torch.from_numpy(layer) @ v[0]).transpose(0, 1).reshape(1, 11, 16)
        torch.testing.assert_close(attn.c_proj(y), out, rtol=1e-4, atol=1e-5)


def padded(rows):
    """Lists of ids as (B, T), with -1 at the front of the shorter ones."""
    return torch.tensor([[-1] * (max(map(len, rows)) - len(row)) + row for row in rows])


def random_rows(*lengths):
    return [torch.randint(23, (n,)).tolist() for n in lengths]


def written(model, idx, n=40, **options):
    """n ids behind each row, (B, n)."""
    return torch.cat(list(islice(model.stream(idx, **options), n)), dim=1)


@every
@pytest.mark.parametrize('is_static', [False, True])
@torch.no_grad()
def test_cached_logits_of_rows_of_different_lengths_are_those_of_each_alone(model, is_static):
    """Whatever the caches held before; with all steps of one shape, as for a compiler, too."""
    rows, caches, place = random_rows(1, 4, 9, 9), model.new_caches(16), torch.zeros(1, dtype=torch.long)
    model.prefill(torch.randint(23, (4, 16)), caches)
    padding = torch.tensor([8, 5, 0, 0])
    logits = model.prefill(padded(rows).clamp(min=0), caches, padding)
    for length in range(9, 17):
        alone = torch.stack([model(torch.tensor([row]))[0][0, -1] for row in rows])
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
        if length < 16:
            new = torch.randint(23, (4, 1))
            rows = [row + ids for row, ids in zip(rows, new.tolist())]
            for cache in caches if is_static else []:
                cache.length = place.fill_(length)
            logits = model.decode(new, caches, padding)


@every
@pytest.mark.parametrize('is_ensemble', [False, True])
def test_greedy_text_of_rows_of_different_lengths_is_that_of_each_alone(model, is_ensemble):
    """Also where their windows are full at different times; the other model has shorter ones, and more ids."""
    other = make_model({'block_size': 12, 'vocab_size': 29, 'position': model.config.position}, seed=1)
    options = dict(n=25, temperature=0, others=[other] if is_ensemble else [])
    rows = random_rows(1, 5, 15, 16, 20, 11)
    alone = torch.cat([written(model, torch.tensor([row]), **options) for row in rows])
    for is_static in False, True:
        assert torch.equal(written(model, padded(rows), **options, is_static=is_static), alone)


@pytest.mark.parametrize('options', [
    {'temperature': 0}, {'top_k': 5, 'top_p': 0.9, 'n_ids': 20, 'gaps': [1, 4]}, {'is_static': True}])
def test_a_token_waits_for_nothing_and_the_memory_stays(model, monkeypatch, options):
    """Nor does a full window; but for the lengths of the rows, at the beginning."""
    caches, new_caches = [], model.new_caches
    monkeypatch.setattr(model, 'new_caches', lambda size: caches.append(new_caches(size)) or caches[-1])
    stream = model.stream(padded(random_rows(3, 7)), others=[model], **options)
    with pytest.raises(Waits), NoWait():
        next(stream)
    stream = model.stream(padded(random_rows(3, 7)), others=[model], **options)
    next(stream)
    place = [cache.k.data_ptr() for layers in caches for cache in layers if cache.k is not None]
    with NoWait():
        for _ in range(30):
            next(stream)
    assert [cache.k.data_ptr() for layers in caches[2:] for cache in layers] == place and len(place) == 6


@each({'modern': MODERN})
def test_a_compiled_step_is_compiled_once(model, monkeypatch):
    """However many tokens are there, and where windows are read anew; and it writes what the others write."""
    idx = padded(random_rows(3, 7))
    expected, counter = written(model, idx, temperature=0), CompileCounter()  # traces, and compiles nothing
    torch.compiler.reset()
    monkeypatch.setattr(model, 'decode', torch.compile(model.decode, backend=counter, fullgraph=True))
    assert torch.equal(written(model, idx, temperature=0, is_static=True), expected) and counter.frame_count == 1
    torch.compiler.reset()


@each(GPT2)
def test_rows_whose_logits_are_not_finite_have_no_id(model):
    model.transformer.wpe.weight.data[5] = math.inf
    ids = written(model, padded([[1, 2, 3], [1, 2, 3, 4, 5]]), 4)
    assert ids[0, :3].min() >= 0 and ids[0, 3] == -1 and ids[1, 0] >= 0 and (ids[1, 1:] == -1).all()
    with pytest.raises(FloatingPointError, match='not finite'):
        model.generate(torch.tensor([[1, 2, 3]]), 4)
    assert model.generate(torch.tensor([[1, 2, 3]]), 3).shape == (1, 6)


@each(LEARNED)
def test_greedy_text_is_the_uncached(model):
    """Within a window as the plain loop does it; a full window is read anew from its second half."""
    written = model.generate(torch.tensor([[1, 2, 3]] * 2), 40, temperature=0)
    ids, seen = [1, 2, 3], [1, 2, 3]
    for _ in range(40):
        ids.append(int(model(torch.tensor([seen]))[0][0, -1].argmax()))
        seen = seen + ids[-1:] if len(seen) < 16 else ids[-8:]
    assert written.tolist() == [ids, ids]


@each(ROPE)
@pytest.mark.parametrize('is_static', [False, True])
@torch.no_grad()
def test_a_window_that_is_full_slides(model, monkeypatch, is_static):
    """
    Against one pass over the whole text in which each token looks at the 16 up to itself; the second of the rows begins
    four tokens later.
    """
    idx, T, place = torch.randint(23, (2, 60)), 60, torch.zeros(1, dtype=torch.long)
    caches, padding = model.new_caches(16), torch.tensor([0, 4])
    logits = [model.prefill(idx[:, :9], caches, padding)]
    for t in range(9, T):
        for cache in caches if is_static else []:
            cache.length = place.fill_(t)
        logits.append(model.decode(idx[:, t:t + 1], caches, padding))
    places = torch.arange(T)
    window = (places[:, None] - places < 16) & (places[:, None] >= places)
    model.config.block_size = T
    for row, start in zip(range(2), padding.tolist()):
        monkeypatch.setattr(models, 'inside_documents', lambda *args, n=start: window[None, None, n:, n:])
        ids = idx[[row], start:]
        whole = model.lm_head(model.hidden(ids, documents=torch.zeros(1, T - start)))[0]
        torch.testing.assert_close(torch.stack(logits, dim=1)[row], whole[8 - start:], rtol=1e-4, atol=1e-4)


@each(ROPE)
def test_text_of_rows_of_different_lengths_is_that_of_each_alone_past_the_window(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    alone = torch.cat([written(model, torch.tensor([prompt]), 50, temperature=0) for prompt in prompts])
    for is_static in False, True:
        assert torch.equal(written(model, padded(prompts), 50, temperature=0, is_static=is_static), alone)


def test_prompts_longer_than_the_window(model):
    prompt = torch.randint(23, (1, 40))
    written = model.generate(prompt, 1, temperature=0)
    assert torch.equal(written[:, :40], prompt)
    assert written[0, 40] == model(prompt[:, -16:])[0][0, -1].argmax()


def test_too_long_a_row_is_named(model):
    with pytest.raises(ValueError, match='17 tokens do not fit block_size = 16'):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_impossible_heads_are_named():
    with pytest.raises(ValueError, match='n_embd = 16 must be a multiple of n_head = 3'):
        GPT(GPTConfig(**CONFIG | {'n_head': 3}))


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1, 0, 1), (0.5, 0, 1), (2, 3, 1), (1, 99, 1), (1, 0, 0.6), (0.7, 4, 0.8), (1, 1, 1), (1, 0, 1e-6), (1, 0, 1e-50),
    (1e-30, 0, 1), (1e-50, 0, 1)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """Against a loop over the sorted probabilities, by counting."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5])
    probs = (logits.double() / temperature).softmax(0)
    allowed, mass = [], 0.0
    for i in probs.argsort(descending=True).tolist()[:top_k or None]:
        allowed.append(i)
    kept = probs[allowed] / probs[allowed].sum()
    for n, p in enumerate(kept.tolist()):
        mass += p
        if mass >= top_p:
            allowed = allowed[:n + 1]
            break
    expected = torch.zeros(6, dtype=torch.double)
    expected[allowed] = probs[allowed] / probs[allowed].sum()
    torch.manual_seed(0)
    drawn = models.choose(logits.repeat(20_000, 1), temperature, top_k, top_p)
    counted = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    assert (counted[expected == 0] == 0).all()
    assert (counted - expected).abs().max() < 0.018  # 5 sigma


@pytest.mark.parametrize('n_ids', [2, 65, 50_257])
def test_a_draw_is_that_of_torchs_multinomial(n_ids):
    """Bit for bit, so that a seed gives the text that it gave with it."""
    logits = 3 * torch.randn(10, n_ids)
    torch.manual_seed(1)
    drawn = [models.choose(logits, 1.0, 0, 1.0) for _ in range(20)]
    torch.manual_seed(1)
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    assert all(torch.equal(ids, torch.multinomial(shifted.softmax(dim=-1), 1)) for ids in drawn)


def test_temperature_zero_takes_the_likeliest():
    assert models.choose(torch.tensor([[0.0, 3.0, 1.0]]), 0, 0, 1.0).tolist() == [[1]]


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    ids = model.generate(torch.zeros(64, 1, dtype=torch.long), 30, temperature=5.0, n_ids=3)
    assert ids.max() == 2


def test_a_new_model_guesses_fairly():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=4, n_head=4, n_embd=128))
    idx = torch.randint(300, (8, 64))
    assert abs(model(idx, idx.roll(1))[1].item() - math.log(300)) < 0.1
    assert abs(model.transformer.h[0].mlp.c_proj.weight.std().item() - 0.02 / math.sqrt(8)) < 2e-4
    assert abs(model.transformer.wte.weight.std().item() - 0.02) < 2e-4


def test_facts():
    model = GPT(GPTConfig())  # GPT-2
    matrices, vectors = 50304 * 768 + 12 * 12 * 768 * 768, 12 * (2 * 2 + 3 + 1 + 4 + 1) * 768 + 2 * 768
    assert model.count_params() == matrices + vectors  # 124M, as GPT-2 small is called
    assert model.count_params(non_embedding=False) == matrices + vectors + 1024 * 768
    assert model.flops_per_token() == 6 * (matrices + vectors) + 12 * 12 * 768 * 1024
    model = make_model(MODERN)  # what is only looked up costs nothing
    lookups = model.transformer.wte.weight.numel() + model.transformer.ngrams.weight.numel()
    assert model.flops_per_token() == 6 * (model.count_params() - lookups) + 12 * 3 * 16 * 16
