"""RibonanzaNet's published arithmetic, with the parameters of our network: slow, to compare with.

For one RNA alone, without padding, where the published code and ours must agree.
"""
import torch
import torch.nn.functional as F
from einops import einsum, rearrange

from ribo_nb.ribonanzanet import RibonanzaNet, official_ids, unread_names


def outer_product(m, x):
    s = m.proj_down1(x)
    products = einsum(s, s, 'b j c, b i e -> b i j c e')
    return m.proj_down2(rearrange(products, 'b i j c e -> b i j (c e)'))


def triangle(m, z):
    x = m.norm(z)
    left = m.left_proj(x)*m.left_gate(x).sigmoid()
    right = m.right_proj(x)*m.right_gate(x).sigmoid()
    which = 'b k j p, b k i p -> b i j p' if m.ingoing else 'b i k p, b j k p -> b i j p'
    return m.to_out(m.to_out_norm(einsum(left, right, which))*m.out_gate(x).sigmoid())


def attention(m, x, bias):
    q, k, v = (rearrange(w(x), 'b l (h k) -> b h l k', h=m.n_head) for w in (m.w_qs, m.w_ks, m.w_vs))
    logits = einsum(q, k, 'b h i k, b h j k -> b h i j')/q.shape[-1]**.5 + bias
    y = einsum(m.drop(logits.softmax(-1)), v, 'b h i j, b h j k -> b h i k')
    return m.layer_norm(m.drop(m.fc(rearrange(y, 'b h l k -> b l (h k)'))) + x)


def layer(m, x, z, is_last):
    x = m.norm3(x + rearrange(m.conv(rearrange(x, 'b l d -> b d l')), 'b d l -> b l d'))
    bias = rearrange(m.pairwise2heads(m.pairwise_norm(z)), 'b i j h -> b h i j')
    x = m.norm1(x + m.drop(attention(m.self_attn, x, bias)))
    x = m.norm2(x + m.drop(m.linear2(m.drop(F.gelu(m.linear1(x))))))
    if is_last: return x, z
    z = z + outer_product(m.outer_product_mean, x)
    z = z + m.drop_along(1, triangle(m.triangle_update_out, z))
    z = z + m.drop_along(2, triangle(m.triangle_update_in, z))
    return x, z + m.pair_transition(z)


def published(m: RibonanzaNet, batch: dict) -> torch.Tensor:  # b l m
    "The whole network"
    x = m.encoder(official_ids(batch))
    i = torch.arange(x.shape[1])
    bins = ((i[:, None] - i).clamp(-8, 8)[..., None] == torch.arange(-8, 9)).float()
    z = outer_product(m.outer_product_mean, x) + m.pos_encoder.linear(bins)
    for k, block in enumerate(m.transformer_encoder, 1):
        x, z = layer(block, x, z, k == len(m.transformer_encoder))
    return m.decoder(x)


def official_state(m: RibonanzaNet) -> dict:
    "The weights of a network as the official file holds them, with what changes no prediction beside them"
    unread = {name: torch.zeros(1) for name in unread_names(len(m.transformer_encoder))}
    return m.state_dict() | unread
