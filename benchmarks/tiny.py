"""A tiny language model for benchmarks of all that is around the model: a GPT-2 whose tokens are bytes."""

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer


def byte_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer without a merge: a token a byte, and <|endoftext|>."""
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    return GPT2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def save_tiny_model(folder: str) -> str:
    """A GPT-2 of 24 thousand parameters with random weights, and its tokenizer, in `folder`; gives `folder`."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=32,
            n_layer=1,
            n_head=2,
            attn_pdrop=0.0,  # with it SDPA leaves its fused kernel
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
