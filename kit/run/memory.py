"""
What a training step takes of one device, memory and time, by arithmetic: nothing here runs a model or asks a device.

    what = memory.sizes(model)                              # of a model on any device, meta too
    parts = memory.of_step(what, Setup(tokens=12 * 1024))   # {part: bytes}, at the peak; their sum is the peak

The activations are counted as in Korthikanti et al. 2022 (arXiv:2205.05198), what is sharded as in Rajbhandari et al.
2020 (ZeRO, arXiv:1910.02054); what is left was fitted to the peaks of torch.cuda.max_memory_allocated on an H200, with
torch 2.11 (tests/test_memory.py has them). On a CPU small models were within 5% of what torch's profiler counts, in
two processes with DDP too, in two and four with FSDP within 11%. Neither DDP nor FSDP was measured on GPUs.
"""

from dataclasses import dataclass, replace

WORKSPACE = 64 * 2**20  # bytes that cuBLAS and its like take from torch's allocator on a GPU


@dataclass(frozen=True)
class Sizes:
    """What a plan goes by. The numbers of parameters are counts, not bytes."""

    parameters: int         # all of them, a tied one once
    hidden: int             # those in the matrices of the blocks
    output: int             # those of the matrix that makes the logits
    flops_per_token: float  # forward and backward
    is_tied: bool           # whether the output matrix reads the tokens too
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    has_rope: bool
    has_qk_norm: bool
    is_gated: bool
    written_out_to: int     # so short rows have their attention written out on a CPU in bfloat16


@dataclass(frozen=True)
class Setup:
    """How a run uses its devices."""

    tokens: int                   # of a micro-step, on one device
    dtype: str = 'bfloat16'       # of the matrix products
    device: str = 'cuda'          # its type
    optimizer: str = 'adamw'      # as the setting names it
    is_averaged: bool = False     # whether a running average of the weights is kept
    micro_steps: int = 1          # in a step, on one device
    world_size: int = 1
    parallel: str = 'ddp'         # or fsdp
    checkpointing: bool = False   # each block's activations are made again in the backward pass
    offload: bool = False         # fsdp: parameters, gradients and moments lie in the host's memory
    compiled: bool = False

    @property
    def width(self):
        """Bytes of a number in the matrix products."""
        return 4 if self.dtype == 'float32' else 2

    @property
    def is_fsdp(self):
        return self.parallel == 'fsdp' and self.world_size > 1


def sizes(model):
    """The Sizes of a model, which may lie on the meta device: nothing is computed."""
    c, fields = model.config, vars(model.config)
    return Sizes(
        model.count_params(non_embedding=False), sum(p.numel() for p in model.hidden_matrices()),
        c.vocab_size * c.n_embd, model.flops_per_token(), bool(fields.get('tied')), c.n_layer, c.n_head, c.n_embd,
        c.block_size, c.vocab_size, c.dropout, fields.get('position') == 'rope', bool(fields.get('qk_norm')),
        'swiglu' in fields.values(), model.written_out_to)


def of_step(what, how):
    """
    Bytes on one device at the peak of a step: {part: bytes}. what: Sizes; how: Setup.

    The peak is the highest of some moments of the last micro-step: the loss, when all activations and the logits are
    there and no gradients yet (from one micro-step to the next, and in DDP's buckets, they stay); the backward pass of
    the last block, and of the first, when nearly all gradients are there; that of the embeddings; the optimizer's step.
    """
    return max(moments_of_step(what, how), key=lambda parts: sum(parts.values()))


def total(what, how):
    """Bytes on one device at the peak of a step."""
    return sum(of_step(what, how).values())


def moments_of_step(what, how):
    """The parts at the moments of of_step, in their order."""
    at_rest = 0 if how.offload else 1 / how.world_size if how.is_fsdp else 1  # the share of it that lies here
    gradients = 4 * what.parameters
    # DDP's buckets are there all the time (gradient_as_bucket_view), FSDP adds up whole gradients before it shares them
    before = gradients if how.micro_steps > 1 or how.world_size > 1 and not how.is_fsdp else 0
    after = gradients * (1 if how.is_fsdp and how.micro_steps > 1 else at_rest)
    always = {'parameters': 4 * what.parameters * at_rest, 'optimizer': optimizer_bytes(what, how) * at_rest}
    if how.device == 'cpu':  # where a checkpoint is written from a copy
        always['checkpoint copy'] = sum(always.values())
    rest = WORKSPACE if how.device == 'cuda' else 0
    activations, passing = kept(what, how), of_a_block(what, how)
    outside = how.tokens * (8 + how.width) * what.n_embd  # what the embeddings and the last normalization keep
    at_loss, amid_blocks, at_end = communication(what, how)
    copies = 0
    if how.width < 4:  # autocast's, which the backward pass reads; blocks made again, or gathered so, have none
        has_none = how.checkpointing or how.is_fsdp and gathered_width(how) == how.width
        copies = how.width * (what.output + (0 if has_none else what.hidden))
    twice = 8 * what.output if what.is_tied else 0  # one matrix has a gradient of each of its two uses, and their sum
    amid = always | {'logits': 0, 'communication': amid_blocks, 'workspace': rest}
    end = always | {'activations': 0, 'logits': 0, 'communication': at_end, 'workspace': rest}
    return [
        always | {'gradients': before, 'activations': activations + outside + copies, 'logits': logits(what, how),
                  'communication': at_loss, 'workspace': rest},
        amid | {'gradients': max(before, 4 * what.output * at_rest), 'activations': activations + copies + passing},
        amid | {'gradients': max(before, 4 * (what.output + what.hidden) * at_rest), 'activations': passing},
        end | {'gradients': after + twice},
        end | {'gradients': after, 'optimizer': always['optimizer'] + scratch(what, how) * at_rest}]


def optimizer_bytes(what, how):
    """AdamW has two moments in float32, Muon one of each matrix in the blocks; a running average is one more copy."""
    moments = 8 * what.parameters - (4 * what.hidden if how.optimizer.startswith('muon') else 0)
    return moments + (4 * what.parameters if how.is_averaged else 0)


def scratch(what, how):
    """What Muon's step makes of the matrices of one size, two thirds of all: their update, and in its format three."""
    return (4 + 3 * how.width) * what.hidden * 2 / 3 if how.optimizer.startswith('muon') else 0


def kept(what, how):
    """
    Bytes of the activations of all blocks where the loss is computed; with checkpointing those are the blocks' inputs,
    in float32, as the stream is.
    """
    a_block = 4 * what.n_embd if how.checkpointing else kept_by_block(what, how)
    return how.tokens * what.n_layer * a_block


def kept_by_block(what, how):
    """
    Bytes a token that the backward pass of one block reads. GPT-2's: the stream before both normalizations, in float32,
    and 14 numbers a channel in the format of the products, which are the input of each matrix (1 + 1 + 1 + 4), queries,
    keys and values (3), and what GELU reads (4). Compiled code kept one more on an H200.
    """
    numbers = 15 if how.compiled else 14
    extra = 0  # bytes a channel
    if what.is_gated:
        numbers += 8 / 3  # 4 of two thirds of the width, where GELU has 2 of the whole
    if what.has_rope or what.has_qk_norm:
        numbers += 3  # queries and keys once more, and attention's output in another order
    if what.has_qk_norm and how.device == 'cuda' and how.width < 4 and not how.compiled:
        extra += 14  # autocast normalizes in float32; measured
    if what.dropout:
        extra += 2 * (how.width if how.device == 'cpu' else 1)  # two masks
    if is_written_out(what, how):
        extra += what.n_head * what.block_size * how.width / what.n_embd * (3 if what.dropout else 1)
    statistics = 4 * (4 + what.n_head * (1 + 4 * what.has_qk_norm))
    return what.n_embd * (8 + numbers * how.width + extra) + statistics


def is_written_out(what, how):
    """Whether attention makes (T, T) matrices."""
    return how.device == 'cpu' and (what.dropout > 0 or how.dtype == 'bfloat16'
                                    and what.block_size <= what.written_out_to)


def of_a_block(what, how):
    """
    Bytes that the backward pass of one block makes beside what was kept: the gradients of the stream, 4 a channel, and
    behind the MLP's second matrix, 1 + 4 numbers; or, once the MLP has given back 9, those of two (T, T) matrices. With
    checkpointing its activations once more.
    """
    numbers = 5
    if is_written_out(what, how):
        numbers = max(numbers, 2 * what.n_head * what.block_size / what.n_embd + 3 - 9)
    made = what.n_embd * (4 + numbers * how.width)
    return how.tokens * (made + (kept_by_block(what, how) if how.checkpointing else 0))


def logits(what, how):
    """
    Bytes of the logits where there are most: eagerly their log-softmax and its gradient, both in float32, and that of
    the logits, which a CPU makes in float32 first. Compiled code makes all of them out of the logits, where these lie.
    """
    each = how.width if how.compiled else 8 + (4 if how.device == 'cpu' else how.width)
    return how.tokens * what.vocab_size * each


def communication(what, how):
    """
    Bytes of FSDP's buffers at the loss, amid the backward pass and at its end. A block is gathered while the one before
    it computes, on a GPU in the format of the products; what is in no block stays gathered from forward to backward, in
    float32. Gradients are shared out in float32, those of two blocks at a time, while a third one makes its own; those
    of what is in no block at the end. DDP's buckets are the gradients.
    """
    if not how.is_fsdp:
        return 0, 0, 0
    block, root, width = what.hidden / what.n_layer, what.parameters - what.hidden, gathered_width(how)
    gathered = 4 * root + 2 * width * block
    last = 4 + (4 if what.is_tied else 8)  # a tied matrix has its two gradients first, see moments_of_step
    return gathered, gathered + (width + 2 * 4) * block, last * root


def gathered_width(how):
    """Bytes of a number of a block that FSDP has gathered, see ranks.shard."""
    return how.width if how.device == 'cuda' else 4


def flops(what, how):
    """
    Of a token, forward and backward, as in appendix B of PaLM (Chowdhery et al. 2022, arXiv:2204.02311); checkpointing
    makes the forward pass of the blocks, a third of theirs, once more.
    """
    of_blocks = what.flops_per_token - 6 * what.output
    return what.flops_per_token + (of_blocks / 3 if how.checkpointing else 0)


def seconds(what, how, peak, mfu, bandwidth):
    """
    Seconds of a step, (computing, waiting for the exchange). peak: FLOP/s of a device; mfu: the share of it that a run
    reaches; bandwidth: bytes a second into and out of each device.

    With W devices DDP's ring moves 2 (W - 1) / W x 4 bytes a parameter
    through each, once a step, beside the backward pass of the last micro-step, two thirds of it. FSDP gathers the
    blocks twice a micro-step, in the format of the products, and the rest once, and shares the gradients out once a
    step, (W - 1) / W of each (ZeRO stage 3), beside all of the computing. What takes longer than what it is beside is
    waited for.
    """
    micro_step = flops(what, how) * how.tokens / (peak * mfu)
    computing = how.micro_steps * micro_step
    share = (how.world_size - 1) / how.world_size
    if how.is_fsdp:
        of_micro_step = 2 * gathered_width(how) * what.hidden + 4 * (what.parameters - what.hidden)
        moved = share * (how.micro_steps * of_micro_step + 4 * what.parameters)
        beside = computing
    else:
        moved = share * what.parameters * 8
        beside = micro_step * 2 / 3
    return computing, max(0.0, moved / bandwidth - beside)


def most_rows(what, how, rows, room, most):
    """
    The most rows of a micro-step, of those by which the rows of a step on one device can be divided and at most `most`,
    whose step takes at most room bytes; 0 where not even one does.
    """
    for n in divisors(rows):
        new = replace(how, tokens=n * what.block_size, micro_steps=rows // n)
        if n <= most and total(what, new) <= room:
            return n
    return 0


def divisors(n):
    """Those of n, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]
