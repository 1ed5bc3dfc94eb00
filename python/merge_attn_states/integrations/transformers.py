"""Split attention for models of Hugging Face transformers: keys in parts, merged exactly.

What transformers' attention functions get, and what the merge wants:

| transformers                                               | here                              |
| ---------------------------------------------------------- | --------------------------------- |
| query, key, value [batch, heads, tokens, head_size]        | the same; key and value in parts  |
| output [batch, tokens, heads, head_size], weights          | that layout; no weights: None     |
| one mask format an implementation                          | sdpa's: bool, True where seen     |
| sdpa's mask is left out where nothing or only the causal   | is_causal of the call or of the   |
|   half is masked                                           |   module; the causal half by rows |
| sdpa's is_causal is aligned top-left: keys past the last   | cut off first; where keys are     |
|   query are the unused end of a static cache               |   fewer, by a mask                |
| position_bias, added to the scores (T5 and its kin)        | joined with the mask              |
| grouped queries: num_key_value_groups                      | from the shapes                   |
| learned queries with a batch of one                        | expanded to the batch of the keys |
| autocast: a rotary embedding leaves query and key float32  | all three, and what is added to   |
|   beside a 16-bit value, and sdpa itself casts all three   |   the scores, cast as sdpa does   |
| a row that is masked everywhere                            | zeros                             |
| a sliding window at least as long as the keys              | hides nothing: taken              |
| a shorter one, dropout, softcap, sinks, packed sequences,  | refused by name                   |
|   sparse indices, head masks, attention weights            |                                   |
| gradients                                                  | refused: use torch.no_grad()      |
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ._split_attention import AttentionWithLse, check_parts, split_attention
from .pytorch import attention_with_lse

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "merge_attn_states.integrations.transformers needs transformers 4.57 or newer: "
        "pip install 'merge-attn-states[transformers]'"
    ) from error

__all__ = ["register", "split_attention_forward"]

# Arguments that change the result and are not computed here, with the models that pass them.
_REFUSED = {
    "softcap": "Gemma 2",
    "s_aux": "attention sinks, gpt-oss",
    "sinks": "attention sinks",
    "sliding_window": "Mistral, with more keys than the window is long",
    "head_mask": "BERT before transformers 5",
    "layer_head_mask": "BART before transformers 5",
    "output_attentions": "the weights of split attention are never whole",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "indices": "sparse attention, DeepSeek-V3.2",
    "block_indices": "sparse attention, MiniMax",
}
_OWN_NAMES = ("eager", "sdpa", "flex_attention", "flash_attention")


def register(
    name: str = "merge_attn_states",
    parts: int = 2,
    *,
    attend: AttentionWithLse = attention_with_lse,
) -> str:
    """Register split attention with transformers, under a name that any model can be set to.

    Parameters
    ----------
    name : str, optional
        What a model's `attn_implementation` will be called. A registered name is replaced, so that
        `parts` can be changed; transformers' own names are refused.
    parts : int, optional
        Into how many parts of nearly equal length the keys are split. 1 computes the same
        attention without a merge.
    attend : callable, optional
        Computes one part, in place of `attention_with_lse`, with its arguments and results.

    Returns
    -------
    str
        `name`.

    Raises
    ------
    ValueError
        `name` belongs to transformers or `parts` is less than 1.

    Notes
    -----
    Calling a model then needs `torch.no_grad()` or inference mode: the merge has no gradient.

    Examples
    --------
    >>> from merge_attn_states.integrations.transformers import register
    >>> register("split_in_four", parts=4)
    'split_in_four'

    From here on `AutoModel.from_pretrained(path, attn_implementation="split_in_four")`, or
    `model.set_attn_implementation("split_in_four")` on a model that is already there.
    """
    # transformers looks for these words inside a name and would treat it as one of its own.
    if not name or any(own in name for own in _OWN_NAMES) or "|" in name or "/" in name:
        raise ValueError(
            f"name: expected one without '|', '/' and transformers' own {', '.join(_OWN_NAMES)}, "
            f"got {name!r}"
        )
    check_parts(parts)
    AttentionInterface.register(name, partial(split_attention_forward, parts=parts, attend=attend))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def split_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    *,
    parts: int = 2,
    attend: AttentionWithLse = attention_with_lse,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `register` hands to transformers.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; only `is_causal` is read, and only where the call does not say.
    query : torch.Tensor
        [batch, num_heads, num_queries, head_size].
    key, value : torch.Tensor
        [batch, num_kv_heads, num_keys, head_size].
    attention_mask : torch.Tensor or None
        Broadcasts to [batch, num_heads, num_queries, num_keys]; bool or additive.
    dropout : float, optional
        Must be 0.
    scaling : float, optional
        None means 1 / sqrt(head_size).
    is_causal : bool, optional
        Used where there is no mask, as transformers' sdpa does.
    position_bias : torch.Tensor, optional
        Added to the scaled scores.
    parts, attend
        As in `register`.
    **kwargs
        What else a model passes. What would change the result is refused.

    Returns
    -------
    output : torch.Tensor
        [batch, num_queries, num_heads, value_head_size], contiguous.
    weights : None
        Split attention never has them whole.

    Raises
    ------
    ValueError
        The model asks for something that is not computed here; the message names it.
    """
    if dropout:
        raise ValueError(f"dropout: expected 0 (call model.eval()), got {dropout}")
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = kwargs.get("sliding_window")
    if isinstance(window, int) and window >= num_keys:
        kwargs["sliding_window"] = None  # no query is so far from a key
    for argument, where in _REFUSED.items():
        if (given := kwargs.get(argument)) is not None and given is not False:
            raise ValueError(
                f"{argument}: not supported by split attention ({where}); expected None, "
                f"got {_short(given)}"
            )
    query, key, value = (_as_autocast(x) for x in (query, key, value))
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and attention_mask is None and num_queries > 1
    if is_causal and num_keys > num_queries:
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
        if position_bias is not None and position_bias.shape[-1] == num_keys:
            position_bias = position_bias[..., :num_queries]
    if is_causal and (position_bias is not None or num_keys < num_queries):
        size = (num_queries, key.shape[2])
        attention_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        is_causal = False
    if position_bias is not None:
        attention_mask = _joined(position_bias, attention_mask)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    output, _ = split_attention(
        query,
        key,
        value,
        attention_mask,
        is_causal=is_causal,
        scale=scaling,
        parts=parts,
        attend=attend,
    )
    return output.view(query.shape[0], num_queries, *output.shape[1:]), None


def _joined(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One additive mask of the bias and of what the mask hides."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _as_autocast(operand: torch.Tensor) -> torch.Tensor:
    """In the dtype that autocast gives sdpa: its own, and float64 is left alone."""
    device = operand.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return operand
    is_double = operand.dtype == torch.float64
    return operand if is_double else operand.to(torch.get_autocast_dtype(device))


def _short(given: object) -> str:
    return f"a tensor {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
