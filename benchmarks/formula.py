"""The formula of section 2.2 of arXiv 2501.01005, as one writes it in PyTorch."""

import torch


def merge_in_pytorch(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor,
) -> None:
    """Merge two parts that are not both empty; run eagerly, and by torch.compile."""
    largest = torch.maximum(prefix_lse, suffix_lse)
    prefix_weight, suffix_weight = (prefix_lse - largest).exp(), (suffix_lse - largest).exp()
    total = prefix_weight + suffix_weight
    output_lse.copy_(largest + total.log())
    prefix_weight = (prefix_weight / total).T.unsqueeze(-1)  # [H, N] -> [N, H, 1]
    suffix_weight = (suffix_weight / total).T.unsqueeze(-1)
    output.copy_(prefix_weight * prefix_output + suffix_weight * suffix_output)
