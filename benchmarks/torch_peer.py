"""The PyTorch side of benchmarks/decode.py: the same model out of transformers and torch modules.

The decoder is transformers' Qwen2 or Llama on a DynamicCache; the VQ-VAE's decoder and quantizer follow
VAR under the official names, so that the weights of our side load strictly. Layout NCHW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from argenseg_jax.models.argenseg import ARGenSeg

Tensor = torch.Tensor


class ResnetBlock(nn.Module):
    """VAR's residual block."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(width)
        self.conv1, self.conv2 = conv(inputs, width), conv(width, width)
        self.nin_shortcut = nn.Identity() if inputs == width else conv(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.proj_out = norm(width), conv(width, 3 * width, 1), conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.reshape(x.shape))


class Decoder(nn.Module):
    """Latent [B, C, S, S] -> image [B, 3, R, R]."""

    def __init__(self, ch: int, ch_mult: tuple[int, ...], blocks: int, channels: int):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in, self.mid = conv(channels, width), nn.Module()
        self.mid.block_1, self.mid.block_2 = ResnetBlock(width, width), ResnetBlock(width, width)
        self.mid.attn_1 = AttnBlock(width)
        ups = []
        for i in reversed(range(len(ch_mult))):
            up, wider = nn.Module(), ch * ch_mult[i]
            up.block = nn.ModuleList(ResnetBlock(wider if j else width, wider) for j in range(blocks + 1))
            last = i == len(ch_mult) - 1
            up.attn = nn.ModuleList(AttnBlock(wider) for _ in range(blocks + 1 if last else 0))
            if i:
                up.upsample = nn.Module()
                up.upsample.conv = conv(wider, wider)
            ups.append(up)
            width = wider
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out, self.conv_out = norm(width), conv(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for i, up in reversed(list(enumerate(self.up))):
            for j, block in enumerate(up.block):
                x = block(x)
                if up.attn:
                    x = up.attn[j](x)
            if i:
                x = up.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class Peer(nn.Module):
    """The language model and the decoding half of the VQ-VAE."""

    def __init__(self, model: ARGenSeg, state: Mapping[str, np.ndarray], device: str, dtype: torch.dtype):
        """model: whose sizes to take;  state: its weights under the official names."""
        super().__init__()
        self.scales, self.vocab, vq = model.scales, model.vocab, model.vqvae
        with torch.device(device):
            self.language_model = language_model(model, dtype)
            self.decoder = Decoder(vq.ch, tuple(vq.ch_mult), vq.num_res_blocks, vq.z_channels)
            self.post_quant_conv = conv(vq.z_channels, vq.z_channels)
            self.codebook = nn.Embedding(vq.codebook_size, vq.z_channels)
            self.phi = nn.ModuleList(conv(vq.z_channels, vq.z_channels) for _ in range(vq.num_phi))
            self.word_embed = nn.Linear(vq.z_channels, model.llm.width, dtype=dtype)
            self.places = nn.Parameter(torch.empty(model.scales.num_codes, model.llm.width, dtype=dtype))
        names = {
            "image_tokenizer.decoder": "decoder",
            "image_tokenizer.post_quant_conv": "post_quant_conv",
            "image_tokenizer.quantize.embedding": "codebook",
            "word_embed": "word_embed",
            "image_tokenizer.quantize.quant_resi.qresi_ls": "phi",
            "language_model": "language_model",
        }
        own = {
            names[p] + k[len(p) :]: torch.from_numpy(v)
            for k, v in state.items()
            for p in names
            if k.startswith(p + ".")
        }
        levels = state["lvl_embed.weight"][model.scales.levels]
        own["places"] = torch.from_numpy(levels + state["pos_1LC"][0])
        self.load_state_dict(own, strict=True)
        self.eval().requires_grad_(False)
        first = self.vocab.first_code
        self.code_head = self.language_model.lm_head.weight[first : first + self.vocab.num_codes]
        self.run, self.draw = self.language_model.model, self.decoder  # what torch.compile wraps

    def compiled(self) -> Peer:
        """The same weights with torch.compile, for any length."""
        self.run = torch.compile(self.language_model.model, dynamic=True)
        self.draw = torch.compile(self.decoder)
        return self

    def mask(self, tokens: Tensor, text_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompt ids [B, L], so many words of text, one mask.

        Returns:
          codes [B, N], images u8[B, 3, R, R], confidence [B], the token after <ge_end> [B, 1].
        """
        with torch.inference_mode():
            cache = self.prefill(tokens, text_tokens)
            codes, confidence, f_hat = self.codes(cache, len(tokens))
            image = self.image(f_hat)
            end = torch.full((len(tokens), 1), self.vocab.ge_end, device=tokens.device)
            return codes, image, confidence, self.next_word(end, cache)

    def prefill(self, tokens: Tensor, text_tokens: int) -> transformers.DynamicCache:
        cache = transformers.DynamicCache()
        word = self.next_word(tokens, cache)
        for _ in range(text_tokens):
            word = self.next_word(word, cache)
        return cache

    def next_word(self, tokens: Tensor, cache: transformers.DynamicCache) -> Tensor:
        """Feeds ids [B, T]: the most likely token after them, [B, 1]."""
        hidden = self.run(input_ids=tokens, past_key_values=cache).last_hidden_state[:, -1:]
        return self.language_model.lm_head(hidden).argmax(-1)

    def codes(self, cache: transformers.DynamicCache, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The loop over the scales: (codes [B, N], their mean probability [B], f_hat)."""
        side, device = self.scales.side, self.code_head.device
        f_hat = torch.zeros(rows, self.codebook.embedding_dim, side, side, device=device)
        start = torch.full((rows, 1), self.vocab.ge_start, device=device)
        x, codes, chosen = self.language_model.model.embed_tokens(start), [], []
        for k, (begin, end) in enumerate(self.scales.bounds):
            pn = self.scales.patch_nums[k]
            if k:
                seen = F.interpolate(f_hat, size=(pn, pn), mode="area").flatten(2).mT
                x = self.word_embed(seen.to(self.places.dtype)) + self.places[begin:end]
            hidden = self.run(inputs_embeds=x, past_key_values=cache).last_hidden_state
            logits = (hidden @ self.code_head.T).float()
            likely, best = logits.max(-1)
            codes.append(best)
            chosen.append(torch.exp(likely - logits.logsumexp(-1)))
            h = self.codebook(codes[-1]).mT.reshape(rows, -1, pn, pn)
            if k < len(self.scales) - 1:
                h = F.interpolate(h, size=(side, side), mode="bicubic")
            f_hat = f_hat + 0.5 * h + 0.5 * self.phi[self.scales.phi_index()[k]](h)
        return torch.cat(codes, 1), torch.cat(chosen, 1).mean(1), f_hat

    def phases(self, tokens: Tensor, text_tokens: int) -> dict[str, Callable[[], None]]:
        """The parts of `mask` that can be run alone: all but the scales and <ge_end>."""
        side, channels = self.scales.side, self.codebook.embedding_dim
        f_hat = torch.zeros(len(tokens), channels, side, side, device=tokens.device)

        def alone(part: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                with torch.inference_mode():
                    part()
                if tokens.is_cuda:
                    torch.cuda.synchronize()

            return run

        return {
            "prefill_and_text": alone(lambda: self.prefill(tokens, text_tokens)),
            "vqvae": alone(lambda: self.image(f_hat)),
        }

    def image(self, f_hat: Tensor) -> Tensor:
        image = self.draw(self.post_quant_conv(f_hat)).clamp(-1, 1)
        return ((image + 1) / 2 * 255).to(torch.uint8)

    def one_by_one(self, tokens: Tensor, count: int) -> Callable[[], Tensor]:
        """Behind a prefill: a function that decodes so many codes, each fed to predict the next."""
        with torch.inference_mode():
            cache = self.prefill(tokens, 0)
        start = torch.full((len(tokens), 1), self.vocab.ge_start, device=tokens.device)

        def run() -> Tensor:
            word = start
            with torch.inference_mode():
                for _ in range(count):
                    hidden = self.run(input_ids=word, past_key_values=cache).last_hidden_state
                    word = (hidden @ self.code_head.T).argmax(-1) + self.vocab.first_code
                cache.crop(-count)
            return word

        return run


def language_model(model: ARGenSeg, dtype: torch.dtype) -> nn.Module:
    """Qwen2 where q, k and v have biases, otherwise Llama, in the sizes of our decoder."""
    lm = model.llm
    form = "Qwen2" if lm.qkv_bias else "Llama"
    sizes = dict(
        vocab_size=model.vocab.size,
        hidden_size=lm.width,
        intermediate_size=lm.mlp,
        num_hidden_layers=lm.depth,
        num_attention_heads=lm.heads,
        rms_norm_eps=lm.eps,
        num_key_value_heads=lm.kv_heads,
        head_dim=lm.head_dim,
        tie_word_embeddings=lm.tied,
        max_position_embeddings=lm.max_positions,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": lm.rope_theta},
    )
    config = getattr(transformers, f"{form}Config")(**sizes)
    return getattr(transformers, f"{form}ForCausalLM")(config).to(dtype)


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)
