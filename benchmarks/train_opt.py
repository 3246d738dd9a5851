# SPDX-License-Identifier: Apache-2.0
"""Trains a small model of the OPT family from scratch, for quality figures on a model that was never quantized before.

Writes a Hugging Face folder with a tokenizer of its own (byte-level BPE), the last tenth of the text as
``held_out.txt`` and calibration tokens of the rest as ``calibration.npy``, for ``quality.py``::

    python -m benchmarks.train_opt OUT --text books.txt --device cuda --minutes 2
    python benchmarks/quality.py OUT --text OUT/held_out.txt --calibration OUT/calibration.npy --device cuda
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

LENGTH = 1024
HELD_OUT = 0.1


def train(model: torch.nn.Module, ids: Tensor, held_out: Tensor, seconds: float, batch: int, rate: float) -> None:
    """AdamW with a warm-up and a cosine over the time that there is; prints both losses now and then.

    Keeps the weights of the smallest held-out loss: a small text is soon known by heart.
    """
    device = ids.device
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.95))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    best, kept = math.inf, {k: v.clone() for k, v in model.state_dict().items()}
    began, step, look = time.perf_counter(), 0, 0.0
    while (done := (time.perf_counter() - began) / seconds) < 1:
        factor = min(1.0, done / 0.03 + 0.01) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        starts = torch.randint(0, ids.numel() - LENGTH, (batch,), generator=generator).tolist()
        tokens = torch.stack([ids[s : s + LENGTH] for s in starts])
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if done - look > 0.05:
            look = done
            now = held_out_loss(model, held_out)
            if now < best:
                best, kept = now, {k: v.clone() for k, v in model.state_dict().items()}
            print(f"{done:4.0%} step {step}: loss {float(loss):.3f}, held-out {now:.3f}", flush=True)
    model.load_state_dict(kept)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, ids: Tensor) -> float:
    model.eval()
    losses = [float(model(window[None], labels=window[None]).loss) for window in ids.reshape(-1, LENGTH)[:16]]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--calibration", type=int, default=48, help="calibration sequences")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    text = args.text.read_text(encoding="utf-8")
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT)))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text[:cut]], vocab_size=args.vocabulary, special_tokens=["<pad>", "</s>"])
    bpe.save(str(args.out / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.out / "tokenizer.json"), bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    ids = torch.tensor(bpe.encode(text[:cut]).ids, device=args.device)
    held_out = torch.tensor(bpe.encode(text[cut:]).ids, device=args.device)
    held_out = held_out[: held_out.numel() // LENGTH * LENGTH]
    print(f"{ids.numel()} tokens to train on, {held_out.numel()} held out", flush=True)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=args.hidden, word_embed_proj_dim=args.hidden,
        ffn_dim=4 * args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        max_position_embeddings=LENGTH, dropout=0.1, attention_dropout=0.0, layerdrop=0.0, init_std=0.02,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = OPTForCausalLM(config).to(args.device).train()
    train(model, ids, held_out, 60 * args.minutes, args.batch, args.rate)
    model.eval().float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "held_out.txt").write_text(text[cut:], encoding="utf-8")
    starts = np.linspace(0, ids.numel() - LENGTH, args.calibration).astype(int)
    np.save(
        args.out / "calibration.npy", np.stack([ids[s : s + LENGTH].cpu().numpy() for s in starts]).astype(np.int32)
    )


if __name__ == "__main__":
    main()
