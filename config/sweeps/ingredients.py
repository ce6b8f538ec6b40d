"""
What each ingredient of the default run brings: taken out of it, and put into a plain GPT-2 with AdamW and its best
rate. At full length, the last evaluation over all of val.
"""

dtype = 'bfloat16'  # as its table was made; where the CPU has no units for it, float32 is faster and as good
eval_interval = 0
eval_iters = 0
save_interval = 0
seeds = 3

_PLAIN = {'architecture': 'gpt2', 'optimizer': 'adamw', 'learning_rate': 4e-3}
variants = {
    'all': {},
    'all, AdamW alone': {'optimizer': 'adamw'},
    'all, rows at random': {'sampling': 'random'},
    'all, learned positions': {'architecture': 'modern,position=learned'},
    'all, embeddings as they are': {'architecture': 'modern,embed_norm=False'},
    'all, queries and keys as they are': {'architecture': 'modern,qk_norm=False'},
    'all, usual beginning': {'architecture': 'modern,zero_init=False'},
    'all, tied head': {'architecture': 'modern,tied=True'},
    'all, no n-grams': {'architecture': 'modern,ngram_embeddings=0'},
    'all, SwiGLU': {'architecture': 'modern,mlp=swiglu'},
    'plain': _PLAIN,
    'plain, Muon': _PLAIN | {'optimizer': 'muon:0.015'},
    'plain, rope': _PLAIN | {'architecture': 'gpt2,position=rope'},
    'plain, embeddings normalized': _PLAIN | {'architecture': 'gpt2,embed_norm=True'},
    'plain, queries and keys normalized': _PLAIN | {'architecture': 'gpt2,qk_norm=True'},
    'plain, begins with nothing': _PLAIN | {'architecture': 'gpt2,zero_init=True'},
    'plain, a head of its own': _PLAIN | {'architecture': 'gpt2,tied=False'},
    'plain, n-grams': _PLAIN | {'architecture': 'gpt2,ngram_embeddings=8192'},
    'plain, SwiGLU': _PLAIN | {'architecture': 'gpt2,mlp=swiglu'},
}
