"""
The GPT-2 model, whole: its configuration, its blocks, its loss, and how it writes text. No other file knows the name or
the shape of a parameter (but for the exchange with other formats), so a change of the model is a change here.

Every parameter has the name and the shape that nanoGPT gives it, and the arithmetic is the same, so that checkpoints
go from one to the other. Shapes: B rows in a batch, T tokens in a row, C = n_embd channels, V = vocab_size.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

if torch.cuda.is_available():
    flex_attention = torch.compile(flex_attention)  # only then does it skip what is masked

# torch's kernels for attention but cuDNN's, which is the fastest on an H100 and takes 82 ms for a plan each time that a
# cache has grown; and its backward pass gave NaN where a mask comes with rows of 64 or 192 tokens
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

WRITTEN_OUT_TO = 256  # tokens in a row: attention in bfloat16 on a CPU, see attend
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
    n_head: int = 12                # 0: one per 64 channels
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True               # biases in the linear layers and LayerNorms, as in GPT-2; without is a bit faster
    gelu_approximate: str = 'none'  # 'tanh' is what OpenAI's weights were trained with
    causal: bool = True             # False: tokens look both ways, to fill masks (BERT); such a model cannot write

    # no fields: names of those that weights do not depend on, so that a resume may change them; and of those that may
    # change where a new run begins with the weights of another, see GPT.fitted
    FREE = 'dropout',
    RESIZABLE = 'block_size',

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float, bool, str) and not isinstance(value, (int, float) if f.type is float else f.type):
                raise ValueError(f'{f.name} = {value!r} should be of type {f.type.__name__}')
        self.n_head = self.n_head or default_heads(self.n_embd)
        for name in 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size':
            if getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)} should be 1 or more')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout = {self.dropout} should be a share below 1')
        if self.gelu_approximate not in ('none', 'tanh'):
            raise ValueError(f"gelu_approximate = {self.gelu_approximate!r} should be 'none' or 'tanh'")

    def least_numbers(self):
        """No model of this configuration has fewer; known before one is made, which may take for ever."""
        return self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd

    def args(self):
        """model_args of a checkpoint: nanoGPT's fields, so that it can read them; others where they are no defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.name in NANOGPT or getattr(self, f.name) != f.default}


def default_heads(n_embd):
    """One head per 64 channels; where that does not divide n_embd, the nearest smaller number that does."""
    return max(n for n in range(1, max(1, n_embd // 64) + 1) if n_embd % n == 0)


def inside_documents(documents, causal, is_sparse):
    """
    Who may look at whom where several documents share a row: those of the same number in documents (B, T), and with
    causal no token at a later one. (B, 1, T, T) bool or, is_sparse, FlexAttention's mask, which costs no (T, T) matrix.
    """
    B, T = documents.shape
    if is_sparse:
        def may_look(b, h, q, kv):
            same = documents[b, q] == documents[b, kv]
            return same & (q >= kv) if causal else same
        return create_block_mask(may_look, B, None, T, T, device=documents.device)
    mask = (documents[:, None, :, None] == documents[:, None, None, :])
    return mask.tril() if causal else mask


def attend(q, k, v, mask, is_causal, dropout):
    """
    softmax(q k' / sqrt(D)) v for q (B, H, T, D) and k, v (B, H, S, D) -> (B, H, T, D). mask: see attention_weights, or
    FlexAttention's; is_causal: T = S, and no token looks at a later one; dropout: share of the weights that is dropped.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    # torch's kernel for CPUs skips what is masked and keeps no (T, S) matrix, but in bfloat16 its backward pass takes
    # five times as long as this at 64 tokens, and twice at 256 (Zen 5); at 1,024 it wins, in float32 the two are even.
    # It knows no dropout: with that torch writes attention out as well
    if q.device.type == 'cpu' and (dropout or q.dtype == torch.bfloat16 and k.size(2) <= WRITTEN_OUT_TO):
        return drop(attention_weights(q, k, mask, is_causal), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout)


def attention_weights(q, k, mask, is_causal):
    """
    Who looks where: q (B, H, T, D) and k (B, H, S, D) -> (B, H, T, S), a row sums to 1. mask: None, or bool of a shape
    that broadcasts to this, True where a query may look.
    """
    (B, H, T, D), S = q.shape, k.size(2)
    scores = q.new_full((T, S), -math.inf).triu(1) if is_causal else q.new_zeros(T, S)
    scores = torch.baddbmm(scores, q.reshape(B * H, T, D), k.reshape(B * H, S, D).transpose(1, 2),
                           alpha=1 / math.sqrt(D)).view(B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


def drop(x, p):
    """
    F.dropout, in training. On a CPU torch draws a number for each entry, on one core; here four share one of 64 bits,
    so p is a multiple of 1 / 65,536.
    """
    if x.device.type != 'cpu' or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p)
    n = min(round(p * 2**16), 2**16 - 1)  # so many of the 65,536 numbers drop, the lowest; they are signed
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    is_kept = bits[:x.numel()].view(x.shape) >= n - 2**15
    return x * is_kept.to(x.dtype).mul_(2**16 / (2**16 - n))


class Dropout(nn.Dropout):

    def forward(self, x):
        return drop(x, self.p) if self.training else x


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at those before it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal
        # one matrix makes the queries, keys and values of all heads
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.heads(x)  # (B, H, T, C/H)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H, all tokens so far, C/H)
        # a single new token needs no mask, it may look at everything that came before
        is_causal = self.causal and mask is None and (cache is None or T > 1)
        y = attend(q, k, v, mask, is_causal, self.dropout if self.training else 0.0)  # (B, H, T, C/H)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def heads(self, x):
        """(B, T, C) -> queries, keys and values, each (B, H, T, C/H)."""
        B, T, C = x.shape
        return [z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2)]

    def weights(self, x, cache=None, mask=None):
        """Who looks where, for pictures: what forward takes, without a cache -> (B, H, T, T), a row sums to 1."""
        q, k, _ = self.heads(x)
        return attention_weights(q.float(), k.float(), None, self.causal)


class MLP(nn.Module):
    """Each token on its own: four times as wide, GELU, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu_approximate)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP, each added to a stream that runs through the whole model; LayerNorm before, as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """The keys and values of one layer for the tokens seen so far, so that a new token costs one token's work."""

    def __init__(self, block_size):
        self.block_size, self.length, self.k = block_size, 0, None

    def extend(self, k, v):
        """Write the (B, H, T, D) of T new tokens behind the others; returns those of all tokens so far."""
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], self.block_size, x.size(3)) for x in (k, v))
        if torch.is_tensor(self.length):  # (1,): all steps have the same shapes, and a mask hides the rest
            self.k[:, :, self.length], self.v[:, :, self.length] = k, v
            return self.k, self.v
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # one matrix reads the tokens and predicts them (Press and Wolf 2016, arXiv:1608.05859)
        self.transformer.wte.weight = self.lm_head.weight

        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # 2 n_layer projections add up in the residual stream; GPT-2 starts them smaller by the root of that
                scale = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1.0
                nn.init.normal_(p, mean=0.0, std=0.02 / scale)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)  # LayerNorm's gains are ones already

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
            if past + T > self.config.block_size:
                raise ValueError(f'{past + T} tokens do not fit block_size = {self.config.block_size}')
        positions = past + torch.arange(T, device=idx.device)  # (T,)
        if documents is not None:
            is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
            positions = positions - (positions * is_first).cummax(dim=1).values  # (B, T): they begin anew in each
            mask = inside_documents(documents, self.config.causal, self.is_sparse(idx.device, T))
        elif padding is not None:
            own, start = positions[:, None], padding[:, None, None]
            places = torch.arange(caches[0].block_size if torch.is_tensor(past) else past + T, device=idx.device)
            mask = (((places >= start) & (places <= own)) | (places == own))[:, None]  # (B, 1, T, places)
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        is_plain = self.config.causal and not caches and documents is None
        with nullcontext() if is_plain else sdpa_kernel(WITHOUT_CUDNN):
            for i, block in enumerate(self.transformer.h):
                x = block(x, caches[i] if caches else None, mask)
        return self.transformer.ln_f(x)

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
        block_size = min(model.config.block_size for model in models)
        n_ids = min([n_ids or math.inf, *(model.config.vocab_size for model in models)])
        gaps, position = (torch.tensor(x, dtype=torch.long, device=idx.device) for x in (gaps, [0]))
        caches = [model.new_caches(block_size) for model in models]
        lengths = [min(n, block_size) for n in (idx >= 0).sum(dim=1).tolist()]
        while True:
            T = max(lengths)
            padding = (idx[:, -T:] < 0).sum(dim=1) if is_static or min(lengths) < T else None
            seen, steps = [idx[:, -T:]], [model.prefill for model in models]
            for length in range(T, block_size + 1):  # of the caches, behind this step
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
                        for x in cache.k, cache.v:  # which the step writes to: a CUDA graph is to find them there again
                            torch._dynamo.mark_static_address(x)
            # Positions are absolute, so a full window cannot slide along. It is read anew from its second half, which
            # costs two token-forwards a token in the long run; a window that slides costs block_size.
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
        """The number of parameters; without those of the positions, as is usual, since they cost no arithmetic."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if not non_embedding or not name.startswith('transformer.wpe.'))

    def flops_per_token(self):
        """Forward and backward, in FLOPs, as in appendix B of PaLM (Chowdhery et al. 2022, arXiv:2204.02311)."""
        return 6 * self.count_params() + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def training_memory(self, n_tokens, dtype, device):
        """
        Bytes that training takes at its peak, roughly. n_tokens: in a micro-step; dtype: its name.

        16 a parameter: weight, gradient and AdamW's two moments in float32; on a CPU 12 more, for the copy of which a
        checkpoint is written. For the backward pass a layer keeps 17 values a channel and token (Korthikanti et al.
        2022, arXiv:2205.05198, counted for attention that keeps no (T, T) matrix), the two of the residual stream in
        float32; half as much again is for what the backward pass itself makes. Attention written out keeps five (T, T)
        matrices a head.
        """
        c, size = self.config, 4 if dtype == 'float32' else 2
        activations = c.n_layer * c.n_embd * (17 * size + (4 - size) * 2) * 1.5
        if device.type == 'cpu' and (c.dropout or dtype == 'bfloat16' and c.block_size <= WRITTEN_OUT_TO):
            activations += c.n_layer * c.n_head * c.block_size * 5 * size
        logits = c.vocab_size * (size + 8)  # and their gradient and softmax in float32
        a_parameter = 28 if device.type == 'cpu' else 16
        return a_parameter * self.count_params(non_embedding=False) + n_tokens * (activations + logits)

    def in_words(self):
        return f'{self.config.n_layer} layers of {self.config.n_head} heads and {self.config.n_embd} channels'

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
            old = state[name]
            new = max(0, self.config.vocab_size - len(old))
            state[name] = torch.cat([old, old.mean(dim=0, keepdim=True).expand(new, -1)]) if new else old
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
