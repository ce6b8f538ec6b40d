"""
The arithmetic of attention, and of dropout: by which kernels, where, and who may look at whom. B rows, T tokens that
ask, S that are asked, H heads of D channels.
"""

import math
from contextlib import nullcontext

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


def rope(positions, D):
    """RoPE (Su et al. 2021, arXiv:2104.09864): what turns x (B, H, T, D), whose positions are (T,) or (B, T)."""
    angles = positions[..., None] * 10000 ** -torch.arange(0, 1, 2 / D, device=positions.device)
    cos, sin = angles.cos(), angles.sin()  # (T, D/2)
    turn = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])  # (2, T, D)
    return turn if positions.dim() == 1 else turn[:, :, None]


def rotate(x, turn):
    """Channels i and i + D/2 of x (B, H, T, D) are a pair."""
    cos, sin = turn.type_as(x)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


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
    is_training = is_causal and torch.is_grad_enabled()  # on rows of one length; else there are masks, or caches grow
    with nullcontext() if is_training else sdpa_kernel(WITHOUT_CUDNN):
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
