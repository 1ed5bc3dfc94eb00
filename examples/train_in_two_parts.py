"""Train through attention that is computed in two parts of the keys and merged.

On a GPU by flex_attention, which has a gradient of its LSE; it has no backward on a CPU, so there
the attention is spelled out.
"""

import torch

from merge_attn_states import merge_states

device = "cuda" if torch.cuda.is_available() else "cpu"


def attend(query, key, value):
    """Return the output [batch, num_heads, num_tokens, head_size] and its LSE, without the last."""
    if device == "cuda":
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        output, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))
        return output, aux.lse
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def attend_in_two_parts(query, key, value):
    half = key.shape[2] // 2
    first = attend(query, key[:, :, :half], value[:, :, :half])
    second = attend(query, key[:, :, half:], value[:, :, half:])
    outputs, lses = zip(first, second, strict=True)
    return merge_states(outputs, lses)[0]


def train(attention, steps=50):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 3 * 64, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    tokens, wanted = torch.randn(2, 1, 4, 128, 64, device=device)
    for _ in range(steps):
        query, key, value = layer(tokens).chunk(3, dim=-1)
        loss = (attention(query, key, value) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), layer.weight.detach()


whole_loss, whole = train(lambda query, key, value: attend(query, key, value)[0])
loss, merged = train(attend_in_two_parts)
print(f"loss after 50 steps: {loss:.6f} in two parts, {whole_loss:.6f} in one")
print("largest difference of the weights:", float((merged - whole).abs().max()))
