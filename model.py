"""
GPT, whole: its configuration, its blocks, its loss, and how it writes text. No other file knows the name or the shape
of a parameter (but for the exchange with other formats), so a change of the model is a change here.

GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") is as in nanoGPT: names, shapes and
arithmetic, so that checkpoints go from one to the other. B rows of T tokens, C = n_embd channels, V = vocab_size.
"""

import math
from dataclasses import dataclass, fields
from itertools import count
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention import WRITTEN_OUT_TO, Dropout, attend, attention_weights, inside_documents, rope, rotate

HASH = 0x1E3779B97F4A7C15, 0x42B2AE3D27D4EB4F, 0x165667B19E3779F9  # odd factors: of an id, and of those before it
BACK = len(HASH) - 1  # how many n-grams look at
NANOGPT = 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'  # fields of its GPTConfig


@dataclass
class GPTConfig:
    """
    The defaults are those of GPT-2 with 124M parameters, and stay: fields that a checkpoint lacks have them. A field of
    the name of a setting in train.py takes its value from there. Raises ValueError where a value will not do.
    """

    block_size: int = 1024          # the longest row, T at most
    vocab_size: int = 50304         # GPT-2's 50257, rounded up to a multiple of 64: matrix products like that
    n_layer: int = 12
    n_head: int = 12                # 0: one per 64 channels, or the nearest number below that divides n_embd
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True               # biases in the linear layers and LayerNorms, as in GPT-2; without is a bit faster
    causal: bool = True             # False: tokens look both ways, to fill masks (BERT); such a model cannot write
    gelu_approximate: Literal['none', 'tanh'] = 'none'  # tanh is what OpenAI's weights were trained with
    # the architecture, by presets and by these names; the defaults are GPT-2's
    position: Literal['learned', 'rope'] = 'learned'  # a vector for each, or queries and keys turned by an angle
    embed_norm: bool = False        # the embeddings are normalized, too
    qk_norm: bool = False           # queries and keys are, so that no logit of the attention explodes
    mlp: Literal['gelu', 'swiglu'] = 'gelu'  # what stands between its two matrices
    tied: bool = True               # one matrix reads the tokens and predicts them
    ngram_embeddings: int = 0       # so many vectors for the last two tokens, and for the last three, by their hash

    PRESETS = {  # this and what follows are no fields
        'gpt2': dict(position='learned', embed_norm=False, qk_norm=False, mlp='gelu', tied=True, ngram_embeddings=0),
        'modern': dict(position='rope', embed_norm=True, qk_norm=True, mlp='gelu', tied=False, ngram_embeddings=8192),
    }
    FREE = 'dropout',  # weights do not depend on it: a resume may change it
    RESIZABLE = 'block_size',  # may change where a new run begins with the weights of another, see GPT.fitted

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if get_args(f.type) and value not in get_args(f.type):
                raise ValueError(f'{f.name} = {value!r} should be one of {", ".join(get_args(f.type))}')
            if f.type in (int, float, bool, str) and not isinstance(value, (int, float) if f.type is float else f.type):
                raise ValueError(f'{f.name} = {value!r} should be of type {f.type.__name__}')
        if self.n_head == 0:
            fits = lambda n: self.n_embd % n == 0 and (self.position != 'rope' or self.n_embd // n % 2 == 0)
            self.n_head = next(filter(fits, range(min(self.n_embd // 64, 1024), 1, -1)), 1)
        for name in 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size':
            if getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)} should be 1 or more')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}')
        if not 0 <= self.ngram_embeddings * self.n_embd <= 2**40:
            raise ValueError(f'ngram_embeddings = {self.ngram_embeddings} should be 0 or as many rows as memory holds')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout} should be a share below 1')
        if self.position == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd = {self.n_embd}: rope in {self.n_head} heads needs an even n_embd / n_head')

    def least_numbers(self):
        """No model of this configuration has fewer; known before one is made, which may take for ever."""
        return self.n_embd * (self.n_layer * self.n_embd + self.vocab_size + BACK * self.ngram_embeddings)

    def args(self):
        """model_args of a checkpoint: nanoGPT's fields, so that it can read them; others where they are no defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.name in NANOGPT or getattr(self, f.name) != f.default}


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at those before it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal
        self.qk_norm = config.qk_norm
        # one matrix makes the queries, keys and values of all heads
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, turn=None, cache=None, mask=None):
        """x: (B, T, C); turn: see rope; mask: see attention_weights."""
        B, T, C = x.shape
        q, k, v = self.heads(x, turn)  # (B, H, T, C/H)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H, all tokens so far, C/H)
        # a single new token needs no mask, it may look at everything that came before
        is_causal = self.causal and mask is None and (cache is None or T > 1)
        y = attend(q, k, v, mask, is_causal, self.dropout if self.training else 0.0)  # (B, H, T, C/H)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def heads(self, x, turn):
        """Queries, keys and values, each (B, H, T, C/H)."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)  # first the queries'
        qk, v = heads.split([2 * self.n_head, self.n_head], dim=1)
        if self.qk_norm:  # Dehghani et al. 2023, arXiv:2302.05442
            qk = F.layer_norm(qk, qk.shape[-1:])
        if turn is not None:
            qk = rotate(qk, turn)
        return *qk.chunk(2, dim=1), v

    def weights(self, x, turn=None, cache=None, mask=None):
        """Who looks where, for pictures: what forward takes, without a cache -> (B, H, T, T), a row sums to 1."""
        q, k, _ = self.heads(x, turn)
        return attention_weights(q.float(), k.float(), None, self.causal)


class MLP(nn.Module):
    """Each token on its own: four times as wide, through GELU, and back; or 8/3 times, with a gate."""

    def __init__(self, config):
        super().__init__()
        self.is_gated, width = config.mlp == 'swiglu', 4 * config.n_embd
        if self.is_gated:  # a third matrix: two thirds of the width make it as large, but for the rounding
            width = 64 * math.ceil(width * 2 / 3 / 64)
        self.c_fc = nn.Linear(config.n_embd, width * (1 + self.is_gated), bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu_approximate)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C), or both the gate and what it lets through
        if self.is_gated:  # Shazeer 2020, arXiv:2002.05202
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = self.gelu(x)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP, each added to a stream that runs through the whole model; LayerNorm before, as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, turn=None, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), turn, cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """Keys, values and ids of the newest block_size tokens in a layer, so that a new one costs one token's work."""

    def __init__(self, block_size):
        self.block_size, self.length, self.k, self.ids = block_size, 0, None, None

    def behind_older(self, idx, n):
        """The ids (B, T) of new tokens, with those of the n before them in front, of which there may be fewer."""
        if self.ids is None:
            self.ids = idx.new_zeros(len(idx), n)
        ids = torch.cat([self.ids, idx], dim=1)
        self.ids.copy_(ids[:, -n:])
        return ids

    def extend(self, k, v):
        """Write the (B, H, T, D) of T new tokens behind the others; returns those of all tokens so far."""
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], self.block_size, x.size(3)) for x in (k, v))
        place, self.length = self.length % self.block_size, self.length + k.size(2)
        if torch.is_tensor(place):  # (1,): all steps have the same shapes, and a mask hides the rest
            self.k[:, :, place], self.v[:, :, place] = k, v
            return self.k, self.v
        self.k[:, :, place:place + k.size(2)], self.v[:, :, place:place + k.size(2)] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class GPT(nn.Module):
    written_out_to = WRITTEN_OUT_TO  # as attention is, on a CPU: what a user of this model needs more memory for

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.slides = config.position == 'rope'  # a full window can move on: only distances count
        parts = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if config.ngram_embeddings:  # Huang et al. 2025, arXiv:2501.16975
            parts['ngrams'] = nn.Embedding(BACK * config.ngram_embeddings, config.n_embd)
        if config.position == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if config.embed_norm:
            parts['ln_e'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts | dict(
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:  # Press and Wolf 2016, arXiv:1608.05859; it then goes by the name of the embedding
            self.transformer.wte.weight = self.lm_head.weight

        for name, p in self.named_parameters():
            self.initialize(name, p)

    @torch.no_grad()
    def initialize(self, name, p):
        """Fill a parameter as it begins, where that is not how torch's module has made it."""
        if name == 'transformer.ngrams.weight':
            p.zero_()
        elif p.dim() >= 2:
            # 2 n_layer projections add up in the residual stream; GPT-2 starts them smaller by the root of that
            scale = math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else 1.0
            p.normal_(mean=0.0, std=0.02 / scale)
        elif name.endswith('.bias'):
            p.zero_()  # LayerNorm's gains are ones already

    def forward(self, idx, targets=None, documents=None, loss_alone=False):
        """
        idx: (B, T) int64 ids, T <= block_size. targets: the same shape, the id that should come next, -1 where none
        counts. documents: the same shape, numbers that differ from one document of a row to the next; then each is
        read as if it were alone. Returns (logits, loss): with targets (B, T, V) and their mean cross-entropy in nats,
        without targets the (B, 1, V) after the last token and None. loss_alone: None for the logits, as training asks
        for it: a compiled backward pass would write and read zeros for their gradient, as large as they are.
        """
        x = self.hidden(idx, documents=documents)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return None if loss_alone else logits, loss

    def hidden(self, idx, caches=None, documents=None, padding=None):
        """
        (B, T) ids -> (B, T, C), what the output layer reads. With caches the ids follow on those seen before. padding:
        (B,), how many at the beginning of a row, there or where there are none in idx, stand for nothing.
        """
        past, T, mask = caches[0].length if caches else 0, idx.size(1), None
        if not torch.is_tensor(past):
            assert past == 0 or T == 1, 'the mask is right for a whole prompt, then for one new token at a time'
            if past + T > self.config.block_size and not (past and self.slides):
                raise ValueError(f'{past + T} tokens do not fit block_size = {self.config.block_size}')
        positions = past + torch.arange(T, device=idx.device)  # (T,)
        if documents is not None:
            is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
            positions = positions - (positions * is_first).cummax(dim=1).values  # (B, T): they begin anew in each
            mask = inside_documents(documents, self.config.causal, self.is_sparse(idx.device, T))
        elif padding is not None:
            own, size = positions[:, None], caches[0].block_size
            places = torch.arange(size if torch.is_tensor(past) else min(past + T, size), device=idx.device)
            held = own - (own - places) % size  # the newest token up to its own that is in a place; below 0: none
            mask = ((held >= padding[:, None, None]) | (held == own))[:, None]  # (B, 1, T, places)
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        x, turn = self.transformer.wte(idx), None
        if self.config.position == 'rope':
            turn = rope(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.transformer.wpe(positions)
        if self.config.ngram_embeddings:
            x = x + self.transformer.ngrams(self.ngrams(idx, positions, caches[0] if caches else None)).sum(0)
        if self.config.embed_norm:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, turn, caches[i] if caches else None, mask)
        return self.transformer.ln_f(x)

    def ngrams(self, idx, positions, cache):
        """(B, T) ids -> (BACK, B, T): the rows of the last two ids, and of the last three; a text begins with fewer."""
        T, n = idx.size(1), self.config.ngram_embeddings
        ids = F.pad(idx, (BACK, 0)) if cache is None else cache.behind_older(idx, BACK)
        key, rows = idx * HASH[0], []
        for back in range(1, BACK + 1):
            before = torch.where(positions >= back, ids[:, BACK - back:BACK - back + T] + 1, 0)  # 0: there is none
            key = key ^ before * HASH[back]
            rows.append((key >> 16 * len(rows)) % n + len(rows) * n)  # other bits: what shares one row, does not both
        return torch.stack(rows)

    def is_sparse(self, device, T):
        """
        Whether FlexAttention is used within documents, which costs no (T, T) mask. It knows no dropout and no heads of
        fewer than 16 channels; short rows gain nothing, and compiled without gradients it crashed on a GPU.
        """
        c = self.config
        return (device.type == 'cuda' and torch.is_grad_enabled() and T > 128 and c.n_embd // c.n_head >= 16
                and not (self.training and c.dropout))

    # -----------------------------------------------------------------------------------------------------------------
    # writing text

    def prefill(self, idx, caches, padding=None):
        """Read (B, T) ids into caches, which are emptied -> logits (B, V) of what comes next. padding: see hidden."""
        for cache in caches:
            cache.length = 0
        return self.lm_head(self.hidden(idx, caches, padding=padding)[:, -1])

    def decode(self, idx, caches, padding=None):
        """The same for the (B, 1) ids that follow on those in the caches."""
        return self.lm_head(self.hidden(idx, caches, padding=padding)[:, -1])

    @torch.no_grad()
    def stream(self, idx, temperature=1.0, top_k=0, top_p=1.0, n_ids=None, others=(), gaps=(), is_static=False):
        """
        Yield the next (B, 1) ids after idx (B, T), for as long as they are asked for. A row of idx that is shorter has
        -1 at the front. Draws from torch's generator. Where the logits are not finite, as those of a run that diverged,
        the id is -1: an error would have to wait for the device.

        temperature: 0 takes the likeliest id, below 1 sharpens, above 1 flattens
        top_k:       only the k likeliest ids; 0 or None: all
        top_p:       only the likeliest ids that together reach this share (Holtzman et al. 2019, arXiv:1904.09751)
        n_ids:       only ids below it: a vocabulary that was rounded up has ids that stand for nothing
        others:      models that have a say too: the ids are drawn from the mean of all probabilities
        gaps:        ids below n_ids that stand for nothing either
        is_static:   all steps have the same shapes, for a compiled decode; each then reads the whole of the caches
        """
        models = self, *others
        if not all(model.config.causal for model in models):
            raise ValueError('this model fills masks (objective = mlm), it cannot write on')
        block_size, slides = min(model.config.block_size for model in models), all(model.slides for model in models)
        n_ids = min([n_ids or math.inf, *(model.config.vocab_size for model in models)])
        gaps, position = (torch.tensor(x, dtype=torch.long, device=idx.device) for x in (gaps, [0]))
        caches = [model.new_caches(block_size) for model in models]
        lengths = [min(n, block_size) for n in (idx >= 0).sum(dim=1).tolist()]
        while True:
            T = max(lengths)
            padding = (idx[:, -T:] < 0).sum(dim=1) if is_static or min(lengths) < T else None
            seen, steps = [idx[:, -T:]], [model.prefill for model in models]
            for length in count(T) if slides else range(T, block_size + 1):  # of the caches, behind this step
                del seen[:-1 if slides else 0]  # in a long text, what a window has left behind
                ids = seen[-1].clamp(min=0)
                votes = (step(ids, cache, padding)[:, :n_ids].float() for step, cache in zip(steps, caches))
                votes = [F.log_softmax(vote, dim=-1) if others else vote for vote in votes]  # (B, n_ids)
                logits = torch.stack(votes).logsumexp(0) if others else votes[0]
                new = choose(logits.index_fill(1, gaps, -math.inf), temperature, top_k, top_p)
                seen.append(torch.where(logits.isfinite().all(dim=-1, keepdim=True), new, -1))
                yield seen[-1]
                steps = [model.decode for model in models]
                if is_static:
                    position.fill_(length)
                    for cache in sum(caches, []):
                        cache.length = position
                        for x in filter(torch.is_tensor, (cache.k, cache.v, cache.ids)):
                            torch._dynamo.mark_static_address(x)  # the step writes to it: a CUDA graph finds it again
            # Learned positions are absolute: a full window cannot slide along. It is read anew from its second half,
            # which costs two token-forwards a token in the long run; a window that slides would cost block_size.
            half, idx = max(1, block_size // 2), torch.cat(seen, dim=1)  # (B, block_size + 1)
            idx[:, :-half].masked_fill_(idx[:, :1] >= 0, -1)  # but of rows with padding all of it
            lengths = [half if n == T else n + block_size + 1 - T for n in lengths]

    def new_caches(self, block_size):
        return [KVCache(block_size) for _ in self.transformer.h]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, n_ids=None, gaps=()):
        """(B, T) ids -> (B, T + max_new_tokens), see stream. FloatingPointError: the logits were not finite."""
        new = self.stream(idx, temperature, top_k, top_p, n_ids, gaps=gaps)
        ids = torch.cat([idx] + [next(new) for _ in range(max_new_tokens)], dim=1)
        if (ids[:, idx.size(1):] < 0).any():
            raise FloatingPointError('the logits of this model are not finite')
        return ids

    # -----------------------------------------------------------------------------------------------------------------
    # what the other files ask of a model, beside forward, hidden and stream: they know no parameter by its name

    def count_params(self, non_embedding=True):
        """The number of parameters; without those of the positions, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if not non_embedding or not name.startswith('transformer.wpe.'))

    def flops_per_token(self):
        """
        Forward and backward, in FLOPs, as in appendix B of PaLM (Chowdhery et al. 2022, arXiv:2204.02311); an embedding
        costs none, unless it is the output layer too.
        """
        lookups = {module.weight for module in self.modules() if isinstance(module, nn.Embedding)}
        n = sum(p.numel() for p in self.parameters() if p not in lookups - {self.lm_head.weight})
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def blocks(self):
        """The modules that stand in a row and are alike: what memory is saved by, one at a time."""
        return [*self.transformer.h]

    def hidden_matrices(self):
        """The matrices in the blocks, as Muon moves them; embeddings and the output layer are none."""
        return [module.weight for module in self.transformer.h.modules() if isinstance(module, nn.Linear)]

    def token_vectors(self):
        """What stands for each id where it is read, (V, C)."""
        return self.transformer.wte.weight.detach()

    def fitted(self, state):
        """
        The weights {name: tensor} of a checkpoint as this model takes them. Those of one with more positions or fewer
        ids: the positions are cut, and new ids, such as the one that hides a token, begin as the mean of the others.
        The masks that nanoGPT's attention kept among the weights, before PyTorch 2, are left out. Raises ValueError
        where there are fewer positions than rows need; what else does not fit load_state_dict says.
        """
        own = self.state_dict().keys()
        state = {name: tensor for name, tensor in state.items() if name in own or not name.endswith('.attn.bias')}
        for name in {'transformer.wpe.weight'} & state.keys():
            if len(state[name]) < self.config.block_size:
                raise ValueError(f'block_size = {self.config.block_size}: these weights know {len(state[name])} '
                                 'positions, no more')
            state[name] = state[name][:self.config.block_size]
        for name in {'transformer.wte.weight', 'lm_head.weight'} & state.keys():
            if (new := self.config.vocab_size - len(state[name])) > 0:
                mean = state[name].mean(0, keepdim=True)
                state[name] = torch.cat([state[name], mean.expand(new, -1)])
        return state


def choose(logits, temperature, top_k, top_p):
    """Draw one id a row from logits (B, V), after the cuts of GPT.stream -> (B, 1)."""
    if temperature < 1e-6:  # float32 could not hold the quotients
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # the shift keeps the largest finite
    if top_k and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        beyond = ranked.cumsum(dim=-1) - ranked >= top_p  # the one that crosses the line stays
        beyond[:, 0] = False
        probs = torch.zeros_like(probs).scatter_(1, order, ranked.masked_fill(beyond, 0))
    # what torch.multinomial does for one draw, but for checks that wait for the device: of exponential times with these
    # rates each is the shortest with the probability of its rate
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)
